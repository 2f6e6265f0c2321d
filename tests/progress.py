"""How far is a long run? One line tells, on a terminal that has tqdm."""

from __future__ import annotations

from collections.abc import Callable


def progress(what: str, seconds: float) -> Callable[[float], None]:
    """Return what to call now and then, with the seconds that have passed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda passed: None
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}"
    # Disabled is None: shown on a terminal only.
    bar = tqdm(desc=what, total=seconds, bar_format=form, leave=False, disable=None)

    def tell(passed: float) -> None:
        bar.n = min(passed, seconds)
        bar.refresh()
        if passed >= seconds:
            bar.close()

    return tell
