"""Keep a function that takes a list, and let threads call it one item at a time."""

from __future__ import annotations

from threading import Thread

from ubatch import ubatch_decorator


@ubatch_decorator(max_size=5, timeout=0.01)
def square_all(numbers: list[int]) -> list[int]:
    """Print what came in, so that one sees the batches, and square it."""
    print(f"batch {numbers}")
    return [number**2 for number in numbers]


def main() -> None:
    print("Called with a list, as before:")
    print(f"output {square_all(list(range(10)))}")

    print("One number from each of ten threads, at most five in a batch:")
    squares: dict[int, int] = {}

    def ask(number: int) -> None:
        squares[number] = square_all.ubatch(number)

    threads = [Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(10):
        print(f"input {number}, output {squares[number]}")


if __name__ == "__main__":
    main()
