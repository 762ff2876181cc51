"""`atelier verify`: asks the rules of a study, while its workers run or later."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from search.verify.evidence import Evidence, gather
from search.verify.rules import FILES, RULES, Finding, Holds, Rule, rules_for, violations
from storage.database import one_moment, retrying


@dataclass(frozen=True)
class Verdict:
    """The rules that were asked of a study, and what they have found."""

    evidence: Evidence
    rules: list[Rule]
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """For programs: what `--json` prints. This form stays stable."""
        return {
            "study": self.evidence.entry.name,
            "trials": len(self.evidence.trials),
            "ended": self.evidence.has_ended,
            "files": self.evidence.has_files,
            "rules": [rule.name for rule in self.rules],
            "findings": [asdict(finding) for finding in self.findings],
        }


def verify(engine: sa.Engine, name: str) -> Verdict:
    """Ask the rules that hold of such a study. Raises InputError.

    All tables are read as of one moment, and files after that. Meanwhile files may have moved on. So
    what is found in them counts only if a second look, at all of it, finds it too.
    """
    first = _look(engine, name)
    if not first.findings:
        return first
    second = _look(engine, name)
    of_files = {rule.name for rule in RULES if rule.needs is FILES}
    lasting = [one for one in second.findings if one.rule not in of_files or one in first.findings]
    return replace(second, findings=lasting)


@retrying
def _look(engine: sa.Engine, name: str) -> Verdict:
    with one_moment(engine) as connection:
        evidence = gather(connection, name)
    kind = Holds.ENDED if evidence.has_ended else Holds.ALWAYS
    return Verdict(evidence, rules_for(evidence, kind), violations(evidence, kind))
