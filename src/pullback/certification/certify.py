"""Trains, measures and writes the certificate."""

from __future__ import annotations

from pullback.certification.constants import measure_constants
from pullback.certification.rates import PulledRates, ends_at
from pullback.certification.record import Certificate
from pullback.certification.settings import DescentSpec, Settings, default_sizes
from pullback.certification.subject import Subject, make_subject
from pullback.certification.training import Path, follow, follow_descent
from pullback.certification.twinning import fits, train_twins
from pullback.certification.watch import Observer, Watch
from pullback.problems.errors import SpecError
from pullback.problems.machine import machine, measuring
from pullback.problems.problem import Problem


def certify(
    problem: Problem, settings: Settings | None = None, *, threads: int = 1, progress: Observer | None = None
) -> Certificate:
    """Trains a problem's model and says what is proved, measured and not claimed of the training.

    The model is trained in double precision on all training samples; rates, constants and the action are those of that
    training. Twins are trained on the first n samples for every n asked for.

    Args:
        problem: What to train.
        settings: With what, and how much is measured; None for the defaults.
        threads: Threads that torch may use.
        progress: Told the phase, the part of it that is done, and a few words.

    Returns:
        The certificate. After Ctrl-C, or once the time is up, it is that of what was reached; see its ``ended``.

    Raises:
        SpecError: If problem, optimizer and numbers make no sense together.
        StabilityError: If a training is not finite or does not repeat itself.
        ContractionError: If a Hessian is not finite.
        KeyboardInterrupt: On Ctrl-C before the first step.
    """
    settings = Settings() if settings is None else settings
    spec, watch = settings.spec, Watch(progress, settings.seconds)
    with measuring(threads):
        subject = make_subject(problem, settings.seed, spec.decay if isinstance(spec, DescentSpec) else 0.0)
        sizes = _sizes(subject, settings)
        batch = None if isinstance(spec, DescentSpec) else subject.problem.batch_size
        found = Certificate(
            problem.name, spec, settings.seed, batch, subject.objective.size, len(subject.data[0]), Path(),
            notes=subject.notes, machine=machine(threads),
        )  # fmt: skip
        try:
            _fill(found, subject, settings, sizes, watch)
        except KeyboardInterrupt:
            if not found.path.actions:
                raise
            found.ended = "interrupted"
        watch.leave()
        found.fits = fits(found.reports)
    found.seconds = {"whole": watch.total, **watch.seconds}
    return found


def _sizes(subject: Subject, settings: Settings) -> tuple[int, ...]:
    """The numbers of samples of twins, ascending.

    Raises:
        SpecError: If one is more than there are, or less than a batch.
    """
    n, name = len(subject.data[0]), subject.problem.name
    full = isinstance(settings.spec, DescentSpec)
    sizes = tuple(sorted(set(settings.sizes or (default_sizes(n) if full else (n,)))))
    if sizes[-1] > n:
        raise SpecError(
            f"{name} has {n} training samples here, twins were asked for n = {sizes[-1]}; give at most {n}."
        )
    batch = subject.problem.batch_size
    if not full and batch is not None and sizes[0] < batch:
        raise SpecError(
            f"a step on {name} sees {batch} samples, twins were asked for n = {sizes[0]}; give n of {batch} or more, "
            f"or a smaller batch_size."
        )
    return sizes


def _fill(found: Certificate, subject: Subject, settings: Settings, sizes: tuple[int, ...], watch: Watch) -> None:
    spec, path = settings.spec, found.path
    watch.enter("training")
    if isinstance(spec, DescentSpec):
        follow_descent(subject, spec, settings.points, path, watch)
    else:
        follow(subject, spec, settings.seed, settings.count, settings.points, path, watch)
    found.phases.append("training")

    watch.enter("rates")
    own = (
        None if path.partition is None else PulledRates(subject.objective, subject.data, path.partition, settings.seed)
    )
    for k, place in enumerate(path.places):
        if k and watch.over():
            break
        found.ends.append(
            ends_at(subject.objective, place, subject.data, settings.seed) if own is None else own.at(place)
        )
        watch.tell((k + 1) / len(path.places))
    found.phases.append(f"rates at {len(found.ends)} of {len(path.places)} places")

    watch.enter("constants")
    if not watch.over():
        found.constants = measure_constants(subject, path, found.ends, own)
        found.phases.append("constants")

    watch.enter("twins")
    train_twins(subject, settings, sizes, found.reports, watch)
    found.phases.append(f"twins at {len(found.reports)} of {len(sizes)} n")
    missing = len(found.reports) < len(sizes) or len(found.reports[-1].pairs) < settings.pairs
    if missing or found.constants is None or len(found.ends) < len(path.places):
        found.ended = "seconds"
