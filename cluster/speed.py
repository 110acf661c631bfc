"""Rough times: operations to compute, and how fast a core or a GPU computes them."""

from collections.abc import Callable
from dataclasses import dataclass

# A trace is seldom as long as it may be: estimates span these shares of max_new_tokens.
SHORTEST, LONGEST = 0.25, 1.0
_HOUR = 3600.0
# Core seconds in which a stage's workers and engines start: most of a tiny model's stage.
_CPU_START = 75.0


@dataclass(frozen=True)
class Speed:
    """Floating-point operations a second of one device, and how far off they may be."""

    decoding: float
    training: float
    factor: float
    rests_on: str


# A core's, measured with a 135M model in bf16.
CORE = Speed(4.5e10, 1.1e11, 1.5, "measured on a core with a model of 135 M")
GPU = Speed(4e13, 1.2e14, 3.0, "assumed for a GPU, not measured")


@dataclass(frozen=True)
class Span:
    """An amount that lies between two."""

    low: float
    high: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> "Span":
        """Both ends multiplied, by the same or by two factors."""
        return Span(self.low * low, self.high * (low if high is None else high))


@dataclass(frozen=True)
class Work:
    """Tokens that are written or learned, the operations for them, and stages that start."""

    tokens: float = 0.0
    decoding: float = 0.0
    training: float = 0.0
    starts: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.decoding + other.decoding,
            self.training + other.training,
            self.starts + other.starts,
        )

    def hours(self, on_gpu: bool) -> tuple[float, float]:
        """Hours of decoding and of training on one GPU, or on one core, at its plain speed."""
        speed = GPU if on_gpu else CORE
        starting = 0.0 if on_gpu else self.starts * _CPU_START
        decoding, training = self.decoding / speed.decoding, self.training / speed.training
        return decoding / _HOUR, (training + starting) / _HOUR


def hours_between(work: Callable[[float], Work], on_gpu: bool) -> list[Span]:
    """Hours of decoding and of training on one device, with short to long traces.

    `work` gives what there is to do where traces have a share of their most tokens.
    """
    factor = (GPU if on_gpu else CORE).factor
    short, long = work(SHORTEST).hours(on_gpu), work(LONGEST).hours(on_gpu)
    return [Span(low / factor, high * factor) for low, high in zip(short, long, strict=True)]


def caveat(on_gpu: bool) -> str:
    """What spans of hours rest on."""
    speed = GPU if on_gpu else CORE
    return (
        f"from traces of a quarter of max_new_tokens to traces of all, at speeds within a factor "
        f"of {speed.factor:g} of those {speed.rests_on}"
    )
