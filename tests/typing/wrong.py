"""Wrong uses; mypy --strict rejects each line that is marked. Read, never run."""

from __future__ import annotations

from ubatch import UBatch, ubatch_decorator


def lengths(words: list[str]) -> list[int]:
    return [len(word) for word in words]


inferred = UBatch(8, 0.01, handler=lengths)
inferred.ubatch(3)  # wrong: an int is not a word
text: str = inferred.ubatch("word")  # wrong: the result is an int
inferred.submit(b"word")  # wrong: bytes are not a word
inferred.map([1, 2])  # wrong: ints are not words
inferred.ubatch("word").upper()  # wrong: an int has no upper()
inferred.submit("word").result("soon")  # wrong: a timeout is a number
texts: list[str] = inferred.map(["a"])  # wrong: the results are ints
inferred.with_options(timeout=1.0)  # wrong: no such option
inferred.stats().calls_total = 3  # wrong: a snapshot is frozen

declared: UBatch[int, int] = UBatch(8, 0.01)
declared.set_handler(lengths)  # wrong: it takes words
declared.set_handler(lambda x: None)  # wrong: it answers nobody
UBatch(8)  # wrong: no timeout
UBatch(8, "soon")  # wrong: a timeout is a number
UBatch(8, 0.01, linger="long")  # wrong: no such linger
UBatch(8, 0.01, backend="asyncio")  # wrong: no such backend
UBatch(8, 0.01, executor="process")  # wrong: no such executor
UBatch(8, 0.01, "thread")  # wrong: options are named


@ubatch_decorator(max_size=8, timeout=0.01)
def squared(xs: list[int]) -> list[int]:
    return [x * x for x in xs]


squared.ubatch("3")  # wrong: a str is not an int
word: str = squared.ubatch(3)  # wrong: the result is an int
squared.map(["3"])  # wrong: strs are not ints
plain: list[str] = squared([1])  # wrong: the function returns ints
ubatch_decorator(8, 0.01, size=3)  # wrong: no such option
