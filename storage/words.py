"""Words for people: a number with what it counts."""


def counted(number: int, thing: str) -> str:
    """A number of things, as in: 1 trial, 2 trials, 3 studies."""
    if number == 1:
        return f"1 {thing}"
    plural = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{number} {plural}"
