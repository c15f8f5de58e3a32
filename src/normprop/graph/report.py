"""What a conversion does, for people: counts, every site, what was left and why."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normprop.errors import requires


@dataclass
class SiteReport:
    """One normaliser of the network.

    Args:
        path: dotted path of its module.
        module: class of the module.
        kind: what it is.
        channels: number of channels.
        calls: how often it is called in a forward pass.
        action: "absorbed", "predicted", "replaced", "kept" or "cannot".
        into: what takes its place: the layer that absorbs it, or the new module.
        reason: why it is not absorbed, is kept, or cannot be converted.
        mean: predicted mean of what it normalises, averaged over channels; ``None`` where nothing was predicted.
        std: predicted standard deviation, root mean square over channels.
        correction: ratio of the variance met in rehearsal to the predicted one; ``None`` without rehearsal.
        source: line of code that calls it.
    """

    path: str
    module: str
    kind: str
    channels: int
    calls: int
    action: str
    into: str = ""
    reason: str = ""
    mean: float | None = None
    std: float | None = None
    correction: float | None = None
    source: str = ""


@dataclass
class ConversionReport:
    """Everything that a conversion does and leaves.

    Args:
        model: class of the network.
        to: what its normalisers become.
        weights: "fresh", "exact" or "rescale".
        captured: "export", or "recorded" with the reason.
        sites: every normaliser, in the order of the forward pass.
        unknown: operators without a rule and what was done about them.
        notes: anything else worth knowing.
        difference: largest difference to the original in evaluation on the example input, relative to the output's
            largest value, once an exact conversion has been proved.

    Example:
        >>> print(ConversionReport("Net", "normprop", "fresh", "export", [
        ...     SiteReport("bn", "BatchNorm2d", "batch norm", 8, 1, "absorbed", "conv", mean=0.1, std=0.5)]))
        Net: 1 normaliser to normprop, weights fresh (1 absorbed)
          site  module       channels  predicted        what becomes of it
          bn    BatchNorm2d         8   0.100 ± 0.500   absorbed by conv
    """

    model: str
    to: str
    weights: str
    captured: str
    sites: list[SiteReport]
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    difference: float | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of sites by action."""
        counted = Counter(site.action for site in self.sites)
        return {action: counted[action] for action in _ACTIONS if counted[action]}

    def __str__(self) -> str:
        number = len(self.sites)
        counts = ", ".join(f"{count} {action}" for action, count in self.counts.items()) or "nothing found"
        lines = [
            f"{self.model}: {number} normaliser{'s' * (number != 1)} to {self.to}, weights {self.weights} ({counts})"
        ]
        if self.sites:
            rows = [("site", "module", "channels", "predicted", "what becomes of it")]
            rows += [_row(site) for site in self.sites]
            widths = [max(len(row[column]) for row in rows) for column in range(4)]
            for row in rows:
                head = f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}"
                lines.append(f"{head}  {row[4]}".rstrip())
        lines += [f"  no rule: {line}" for line in self.unknown] + [f"  note: {line}" for line in self.notes]
        if self.difference is not None:
            lines.append(f"  largest difference to the original in evaluation: {self.difference:.1e} of its output")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers and strings, ready for JSON."""
        return {**asdict(self), "counts": self.counts}

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that loads nothing from elsewhere.

        Args:
            path: where to write it as well, if anywhere.

        Returns:
            The page.

        Raises:
            MissingExtraError: without the extra "report".
        """
        with requires("report"):
            from normprop.report.conversion import page
        from normprop.files import write_content

        text: str = page(self)
        if path is not None:
            write_content(Path(path), text)
        return text


_ACTIONS = ("absorbed", "predicted", "replaced", "kept", "cannot")


def _row(site: SiteReport) -> tuple[str, str, str, str, str]:
    predicted = "" if site.mean is None or site.std is None else f"{site.mean:6.3f} ± {site.std:.3f} "
    name = site.path or "(the model itself)"
    return (
        name + (f" ×{site.calls}" if site.calls > 1 else ""),
        site.module,
        str(site.channels),
        predicted,
        outcome(site),
    )


def outcome(site: SiteReport) -> str:
    """What becomes of a site, in words.

    Example:
        >>> outcome(SiteReport("bn", "BatchNorm2d", "batch norm", 8, 1, "kept", reason="excluded"))
        'kept: excluded'
    """
    words = {"absorbed": f"absorbed by {site.into}", "predicted": site.into, "replaced": site.into,
             "kept": "kept", "cannot": "cannot be converted"}[site.action]  # fmt: skip
    return f"{words}: {site.reason}" if site.reason else words
