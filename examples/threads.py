"""Square ten numbers asked for by ten threads, in few calls of one function."""

from __future__ import annotations

from threading import Thread

from ubatch import UBatch

batches: list[list[int]] = []


def square_all(numbers: list[int]) -> list[int]:
    """Answer a whole batch: the i-th square belongs to the i-th number."""
    batches.append(numbers)
    return [number**2 for number in numbers]


def main() -> None:
    squares: dict[int, int] = {}

    def ask(number: int) -> None:
        squares[number] = squarer.ubatch(number)  # waits for this thread's own answer

    with UBatch(max_size=10, timeout=0.02, handler=square_all) as squarer:
        threads = [Thread(target=ask, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for number in range(10):
        print(f"input {number}, output {squares[number]}")
    for batch in batches:  # how many there are depends on how the threads were timed
        print(f"batch {batch}")


if __name__ == "__main__":
    main()
