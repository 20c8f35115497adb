"""What is kept between calls: counted, used again, and freed."""

import threading
import time

import pytest
import torch

import fasttx
from fasttx import functional

pytestmark = pytest.mark.usefixtures("needs_extension")
WIDTH, HIDDEN = 64, 256


def run(layers, rows=300):
    with torch.no_grad():
        functional.feed_forward(torch.randn(rows, WIDTH), *layers, backend="cpu")


@pytest.fixture
def layers():
    fasttx.empty_cache()
    weight1, weight2 = torch.randn(HIDDEN, WIDTH), torch.randn(WIDTH, HIDDEN)
    return [weight1, None, weight2, None]


def test_a_call_keeps_packed_weights_and_workspaces_and_empty_cache_frees_them(layers):
    assert fasttx.memory() == {"packed_weights": 0, "workspaces": 0}
    run(layers)
    kept = fasttx.memory()
    assert kept["packed_weights"] >= sum(weight.nbytes for weight in layers if weight is not None)
    assert kept["workspaces"] > 0
    fasttx.empty_cache()
    assert fasttx.memory() == {"packed_weights": 0, "workspaces": 0}
    run(layers)  # made anew


def test_repeated_calls_keep_no_more(layers):
    for _ in range(3):  # as work is handed out, a thread may first take part in a later call
        run(layers)
    kept = fasttx.memory()
    for _ in range(10):
        run(layers)
    assert fasttx.memory() == kept


def test_packed_weights_go_with_their_weight(layers):
    run(layers)
    layers.clear()
    assert fasttx.memory()["packed_weights"] == 0


def test_the_workspaces_of_a_thread_go_with_it(layers):
    run(layers)
    kept = fasttx.memory()["workspaces"]
    thread = threading.Thread(target=lambda: (torch.set_num_threads(1), run(layers, rows=500)))
    thread.start()
    thread.join()
    # join() waits for Python's part of the thread; what the system's thread owned goes a little later.
    deadline = time.monotonic() + 5
    while fasttx.memory()["workspaces"] != kept and time.monotonic() < deadline:
        time.sleep(0.001)
    assert fasttx.memory()["workspaces"] == kept


def test_large_workspaces_are_not_kept(layers):
    layers = [torch.randn(4 * 2**20, 1), None, torch.randn(1, 4 * 2**20), None]
    run_input = torch.randn(40, 1)
    with torch.no_grad():
        functional.feed_forward(run_input, *layers, backend="cpu")  # its hidden values take 640 MiB
    assert fasttx.memory()["workspaces"] < (torch.get_num_threads() + 1) * 256 * 2**20
