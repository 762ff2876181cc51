"""What a shell offers after Tab: study files, and studies of this home. No database is asked."""

import glob
import re
from contextlib import suppress

from storage.paths import studies_here


def study_files(incomplete: str) -> list[str]:
    """The study files that begin so, here and one folder below. If none does, the shell offers files."""
    begin = glob.escape(incomplete)
    return sorted({*glob.glob(f"{begin}*.toml"), *glob.glob(f"{begin}*/*.toml")})


def studies(incomplete: str) -> list[str]:
    """The names that begin so, of studies with a run folder in the home; and study files."""
    names: set[str] = set()
    with suppress(OSError):  # a home that may not be read has nothing to offer
        names = studies_here()
    # Bash would put other names, as those with spaces, into the line without quotes.
    plain = {name for name in names if re.fullmatch(r"[\w.,:+@%/=-]+", name)}
    return sorted(name for name in plain if name.startswith(incomplete)) + study_files(incomplete)
