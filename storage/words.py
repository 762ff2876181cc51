"""Words for people: a number with what it counts."""


def counted(number: int, thing: str) -> str:
    """A number of things, as in: 1 trial, 2 days, 3 studies."""
    if number == 1:
        return f"1 {thing}"
    is_ies = thing.endswith("y") and not thing.endswith(("ay", "ey", "oy"))
    return f"{number} {thing[:-1]}ies" if is_ies else f"{number} {thing}s"
