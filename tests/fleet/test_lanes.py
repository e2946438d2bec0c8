"""Who may leave the thread that computes to others."""

import torch

from hermes.fleet.lanes import Lanes


def test_a_request_under_autocast_keeps_the_thread_wherever_it_computes():
    assert Lanes("cuda").may_wait()
    for kind in ("cpu", "cuda"):
        torch.set_autocast_enabled(kind, True)
        try:
            assert not Lanes("cuda").may_wait()
        finally:
            torch.set_autocast_enabled(kind, False)
