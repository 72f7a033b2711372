"""What the losses with several hints say of a ControlNet, with standard errors: a table, and a sentence."""

import math
from dataclasses import dataclass

from torch import Tensor

WIDTH = 125  # of a band of the 1,000 time steps
BANDS = {f"{t} to {t + WIDTH - 1}": slice(t // WIDTH, t // WIDTH + 1) for t in range(0, 1000, WIDTH)}
HINTS = ("own", "other", "empty", "none")  # that the loss is measured with
FEWEST = 8  # pairs for a verdict: of fewer, standard errors say too little
SURE = 3  # standard errors that tell a gap from chance
DOUBLED = 1.0  # share of the loss that another hint adds, from which on samples follow their hints
MOVED = 0.1  # share of the loss, from which on the mean square that another hint moves predictions by is no small one


@dataclass(frozen=True)
class Measurement:
    """Of each pair in each band of t, [pairs, bands]: the losses by hint, and the mean square of own - other."""

    loss: dict[str, Tensor]
    moved: Tensor

    def figures(self, bands: slice = slice(None)) -> dict[str, tuple[float, float]]:
        """Losses, gap and sensitivity: means over bands and pairs, with standard errors."""
        values, found = self.loss | {"gap": self.loss["other"] - self.loss["own"], "sensitivity": self.moved}, {}
        for name, rows in values.items():
            means = rows[:, bands].mean(dim=1)
            found[name] = means.mean().item(), means.std().item() / math.sqrt(len(means))
        square, error = found["sensitivity"]
        root = math.sqrt(square)
        return found | {"sensitivity": (root, error / (2 * root) if root else 0.0)}  # the error of a mean's root


def strongest_band(measured: Measurement) -> tuple[float, float, str]:
    """The largest share that another hint adds to a band's loss, its standard error, and the band.

    The largest: under little noise the picture needs no hint, and under much of it none can help. Bands whose gap is
    not surely above 0 do not count; if none is, it is the share of all bands together.
    """
    shares = []
    for name, bands in (BANDS | {"0 to 999": slice(None)}).items():
        (gap, error), (loss, _) = (measured.figures(bands)[figure] for figure in ("gap", "own"))
        shares.append((gap / loss, error / loss, name))
    return max((share for share in shares[:-1] if share[0] > SURE * share[1]), default=shares[-1])


def verdict(measured: Measurement) -> str:
    """What the figures say, in a sentence."""
    pairs, figures = len(measured.moved), measured.figures()
    (gap, error), moved, loss = figures["gap"], figures["sensitivity"][0] ** 2, figures["own"][0]
    if not math.isfinite(gap):
        return "its predictions are not finite: try --precision fp32, or it is broken"
    if moved == 0:
        return "it does not hear its hint: its residuals are the same whatever the hint"
    if pairs < FEWEST:
        return f"{pairs} pairs are too few for a verdict: take {FEWEST} or more"
    if gap < -SURE * error:
        return "its own hint makes the predictions worse than another's: is it inverted, or of another kind?"
    if gap < SURE * error:
        if moved > MOVED * loss and gap + error < moved / 2:  # a right prediction's gap is what its hint moves
            return (f"its hint moves the predictions, but not towards these {pairs} pictures: is this the kind of hint "
                    "that it was trained with?")  # fmt: skip
        return f"it does not hear its hint yet, as far as {pairs} pairs can tell"
    share, error, band = strongest_band(measured)
    told = "it follows its hint" if share >= DOUBLED else "it hears its hint, but samples hardly show it"
    return f"{told}: another pair's hint raises the loss by {share:.0%} ± {error:.0%} at t = {band}"


def print_table(measured: Measurement) -> None:
    """A line for each band, and one for all of them."""
    names, forms = [f"loss, {hint}" for hint in HINTS], ["{:.4f} ± {:.4f}"] * len(HINTS) + ["{:.1e} ± {:.0e}"] * 2
    print(f"{'t':>10}", *(f"{name:>16}" for name in (*names, "gap", "sensitivity")))
    for band, bands in (BANDS | {"all": slice(None)}).items():
        words = (form.format(*figure) for form, figure in zip(forms, measured.figures(bands).values(), strict=True))
        print(f"{band:>10}", *(f"{word:>16}" for word in words))


def summary(measured: Measurement) -> str:
    (loss, error), (gap, gap_error), (sensitivity, _) = (measured.figures()[k] for k in ("own", "gap", "sensitivity"))
    return f"loss {loss:.4f} ± {error:.4f}, sensitivity {sensitivity:.1e}, gap {gap:.1e} ± {gap_error:.0e}"
