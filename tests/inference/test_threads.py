"""Files are read and written in threads beside the model: in order, with bounded memory, and errors end the run."""

import threading

import pytest
from sharpmask_d2.inference.threads import WriterThread, read_ahead


def test_items_are_read_in_order_and_few_wait():
    read, used = [], []

    def square(i):
        read.append((i, threading.current_thread().name))
        # One more is read while an item is used.
        assert i <= len(used) + 3
        return i * i

    for result in read_ahead(range(20), square):
        used.append(result)
    assert used == [i * i for i in range(20)]
    assert [i for i, _ in read] == list(range(20))
    assert threading.main_thread().name not in {name for _, name in read}


def test_an_error_of_a_reader_is_raised_in_its_place():
    def fail(i):
        if i == 3:
            raise MemoryError(i)
        return i

    results = read_ahead(range(9), fail)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(MemoryError):
        next(results)


def test_calls_are_made_in_order_also_when_the_run_is_stopped():
    calls, gate = [], threading.Event()

    def call(i):
        gate.wait(10)
        calls.append(i)

    def run():
        with WriterThread() as thread:
            thread.call(call, 0)
            gate.set()
            thread.call(call, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [0, 1]


def test_after_an_error_nothing_is_written_and_the_run_ends():
    calls = []

    def call(i):
        if i == 1:
            raise OSError("disk full")
        calls.append(i)

    def run(numbers):
        with WriterThread() as thread:
            for i in numbers:
                thread.call(call, i)

    with pytest.raises(OSError, match="disk full"):
        run(range(100))
    assert calls == [0]
    # Also an error of the last call.
    with pytest.raises(OSError, match="disk full"):
        run([1])
