"""What was made is made once, and what was asked for least recently is dropped first."""

from sd_runtime.recent import Recent


def test_the_last_that_were_asked_for_stay() -> None:
    made: list[str] = []

    def get(key: str) -> str:
        return recent.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    recent: Recent[str, str] = Recent(2)
    assert [get(key) for key in "abacab"] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c"], "nothing is dropped before it is trimmed"
    recent.trim()
    assert [get(key) for key in "abc"] == ["A", "B", "C"]
    assert made == ["a", "b", "c", "c"]
    recent.clear()
    get("a")
    assert made[-1] == "a"
