"""Real fleets of small models: each output as alone, one budget, hot add and remove, and failures that stay at home."""

import os
import threading
import time

import pytest
import torch

import hermes
from hermes.fleet import plan
from hermes.memory.probe import resident_bytes
from small_nets import PIXELS, save_nets, skeleton

MIB = 2**20


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return save_nets(tmp_path_factory.mktemp("nets"))


def fleet_of(nets, names, *, spare_bytes, **options):
    fleet = hermes.Fleet(budget="1GiB", **options)
    for name in names:
        fleet.add(name, skeleton(name), nets[name][1], example_args=(PIXELS,))
    # Margin, slack and activations; and for weights.
    fleet.budget_bytes = fleet._measure_floor() + 48 * MIB + spare_bytes
    return fleet


def expected(nets, name, pixels):
    with torch.no_grad():
        return nets[name][0](pixels)


@pytest.mark.parametrize("policy", ["round-robin", "deadline"])
def test_outputs_are_those_of_each_alone_and_failures_stay_at_home(nets, tmp_path, policy):
    inputs = [PIXELS * scale for scale in (1, 2, -1, 0.5)]
    with fleet_of(nets, ["small", "large"], spare_bytes=28 * MIB, policy=policy) as fleet:
        fleet.start()
        shares = fleet._shares
        overdrawn = []

        def watch(done):
            while not done.wait(0.002):
                accounts = dict(shares.ledger.accounts)
                if sum(accounts.values()) > shares.ledger.budget_bytes:
                    overdrawn.append(accounts)
                for name, member in fleet._members.items():
                    session = member.worker.session
                    if session is not None:
                        ledger = session.ledger
                        if ledger.reserved_bytes > ledger.budget_bytes:
                            overdrawn.append((name, dict(ledger.accounts)))

        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(done,), daemon=True)
        watcher.start()
        futures = [(name, x, fleet.submit(name, x)) for x in inputs * 3 for name in ("small", "large")]
        broken = fleet.submit("small", PIXELS, broken=True)
        after = fleet.submit("small", PIXELS)
        for name, x, future in futures:
            assert torch.equal(future.result(60), expected(nets, name, x))
        with pytest.raises(ValueError, match="broken input"):
            broken.result(60)
        assert torch.equal(after.result(60), expected(nets, "small", PIXELS))

        # Hot add, of a model whose file is damaged while it runs; the others go on.
        damaged = tmp_path / "other.safetensors"
        damaged.write_bytes(nets["other"][1].read_bytes())
        background = [fleet.submit("large", PIXELS) for _ in range(10)]
        fleet.add("other", skeleton("other"), damaged, example_args=(PIXELS,), importance=2.0)
        assert torch.equal(fleet.submit("other", PIXELS).result(60), expected(nets, "other", PIXELS))
        os.truncate(damaged, 5000)
        with pytest.raises(hermes.HermesError, match=r"other\.safetensors"):
            fleet.submit("other", PIXELS).result(60)
        with pytest.raises(hermes.HermesError, match=r"other\.safetensors"):
            fleet.submit("other", PIXELS).result(60)
        assert all(torch.equal(f.result(60), expected(nets, "large", PIXELS)) for f in background)
        assert torch.equal(fleet.submit("large", PIXELS).result(60), expected(nets, "large", PIXELS))

        fleet.remove("other")
        fleet.remove("small")
        with pytest.raises(hermes.InputError, match="small"):
            fleet.submit("small", PIXELS)
        assert torch.equal(fleet.submit("large", PIXELS).result(60), expected(nets, "large", PIXELS))
        done.set()
        watcher.join()
        assert not overdrawn
        report = fleet.report()
        assert report.models["large"].failed == 0
        assert report.models["large"].requests == 24
        assert report.predicted_seconds[report.policy] > 0
    assert not [t.name for t in threading.enumerate() if t.name.startswith("hermes")]


def test_requests_that_take_turns_keep_their_modes_to_themselves(nets):
    """They are on one thread, which gradients, inference and autocast belong to."""
    seen = []

    def inferring(module):
        with torch.inference_mode():
            return module(PIXELS).is_inference()

    def plain(module):
        answer = module(PIXELS)
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return answer

    def rounding(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(PIXELS)

    options = {"policy": "round-robin", "max_active": 2}
    with fleet_of(nets, ["small", "large"], spare_bytes=28 * MIB, **options) as fleet:
        fleet.start()
        for call in (inferring, rounding) * 3:
            one, other = fleet.call("small", call), fleet.call("large", plain)
            assert torch.equal(other.result(60), expected(nets, "large", PIXELS))
            assert not other.result().is_inference()
            assert one.result(60) is not False
        assert fleet.report().models["large"].requests == 6
    assert set(seen) == {(False, False)}


def test_idle_bytes_are_lent_and_come_back(nets, monkeypatch):
    # These keep one of two so small whole, by what computing took when it was measured; and it has no window then.
    monkeypatch.setattr(plan, "HIDING_WINDOWS", ())
    monkeypatch.setattr(plan, "TILTS", plan.TILTS[:1])
    with fleet_of(nets, ["small", "large"], spare_bytes=16 * MIB) as fleet:
        base = dict(fleet.start().quotas)
        deadline = time.monotonic() + 20
        while fleet.quotas["large"] <= base["large"]:  # only `large` has requests: `small` lends
            assert time.monotonic() < deadline
            assert torch.equal(fleet.submit("large", PIXELS).result(60), expected(nets, "large", PIXELS))
        assert fleet.quotas["small"] < base["small"]
        assert sum(fleet.quotas.values()) <= sum(base.values())
        while fleet.quotas["small"] < base["small"]:
            assert time.monotonic() < deadline
            for name in ("small", "large"):
                assert torch.equal(fleet.submit(name, PIXELS).result(60), expected(nets, name, PIXELS))
        assert fleet._shares.ledger.free_bytes >= 0


def test_a_model_that_may_keep_nothing_is_read_for_each_request(nets):
    with hermes.Fleet(budget="1GiB", policy="round-robin") as fleet:
        for name, kept in (("small", None), ("large", 0)):
            fleet.add(name, skeleton(name), nets[name][1], example_args=(PIXELS,), resident_bytes=kept)
        plans = fleet.start().plans
        for name in ("small", "large") * 3:
            assert torch.equal(fleet.submit(name, PIXELS).result(60), expected(nets, name, PIXELS))
        read = {name: one.bytes_read for name, one in fleet.report().models.items()}
        assert plans["large"].resident_bytes == plans["small"].pass_bytes == 0
        assert 3 * plans["large"].pass_bytes <= read["large"]
        assert read["small"] < 1.1 * nets["small"][1].stat().st_size


def test_a_model_that_cannot_be_measured_inside_the_budget_is_refused_before(nets):
    with hermes.Fleet(budget=resident_bytes() + 20 * MIB) as fleet:
        with pytest.raises(hermes.BudgetError, match="measuring small") as refused:
            fleet.add("small", skeleton("small"), nets["small"][1], example_args=(PIXELS,))
        fleet.budget_bytes = refused.value.minimum_bytes + 4 * MIB  # what this process has grown by since
        fleet.add("small", skeleton("small"), nets["small"][1], example_args=(PIXELS,))
        assert torch.equal(fleet.submit("small", PIXELS).result(60), expected(nets, "small", PIXELS))


def test_what_cannot_be_is_refused(nets):
    fleet = hermes.Fleet(budget="1GiB")
    with pytest.raises(hermes.InputError, match="no models"):
        fleet.start()
    with pytest.raises(hermes.InputError, match="example_args"):
        fleet.add("small", skeleton("small"), nets["small"][1])
    with pytest.raises(hermes.InputError, match="importance"):
        fleet.add("small", skeleton("small"), nets["small"][1], example_args=(PIXELS,), importance=0)
    fleet.add("small", skeleton("small"), nets["small"][1], example_args=(PIXELS,))
    with pytest.raises(hermes.InputError, match="already"):
        fleet.add("small", skeleton("small"), nets["small"][1], example_args=(PIXELS,))
    fleet.budget_bytes = resident_bytes() + 20 * MIB
    with pytest.raises(hermes.BudgetError, match="try --budget"):
        fleet.start()
    fleet.close()
    with pytest.raises(hermes.InputError, match="closed"):
        fleet.submit("small", PIXELS)
    with pytest.raises(hermes.InputError, match="round-robin"):
        hermes.Fleet(budget="1GiB", policy="fifo")


def answers(fleet, nets, name):
    return torch.equal(fleet.submit(name, PIXELS).result(60), expected(nets, name, PIXELS))


def test_a_fleet_goes_on_after_its_last_model_was_removed(nets):
    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        assert answers(fleet, nets, "small")
        fleet.remove("small")
        with pytest.raises(hermes.InputError, match="no models"):
            fleet.submit("small", PIXELS)
        fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))
        assert answers(fleet, nets, "other")


def test_models_that_come_and_go_leave_no_trace_in_the_floor(nets, monkeypatch):
    def add(name):
        fleet.add(name, skeleton(name), nets[name][1], example_args=(PIXELS,))

    def refuse(*args, **kwargs):
        raise hermes.BudgetError("not even the smallest windows fit")

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        before = fleet.start()
        for _ in range(2):
            add("other")
            assert fleet.plan.floor_bytes > before.floor_bytes
            fleet.remove("other")
            assert fleet.plan.floor_bytes == before.floor_bytes
        with monkeypatch.context() as patch:
            patch.setattr("hermes.fleet.fleet.plan_fleet", refuse)
            with pytest.raises(hermes.BudgetError, match="not even"):
                add("other")
        assert fleet.plan.floor_bytes == before.floor_bytes
        assert answers(fleet, nets, "small")


def test_a_fleet_that_makes_room_in_vain_stays_as_it_was(nets, monkeypatch):
    """The newcomer cannot be measured beside the others, and cannot be planned for after that."""

    def refuse(*args, **kwargs):
        raise hermes.BudgetError("no room")

    with fleet_of(nets, ["small", "large"], spare_bytes=28 * MIB) as fleet:
        plan = fleet.start()
        assert answers(fleet, nets, "small")
        monkeypatch.setattr(fleet._shares, "make_room", refuse)
        monkeypatch.setattr("hermes.fleet.fleet.plan_fleet", refuse)
        with pytest.raises(hermes.BudgetError, match="no room"):
            fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))
        assert fleet.plan is plan
        assert fleet.quotas == plan.quotas
        assert answers(fleet, nets, "small")
        assert answers(fleet, nets, "large")


def test_the_next_request_starts_engines_that_could_not_go_on(nets, monkeypatch):
    """And what made a change fail is said, not what made going back fail."""

    def fail(*args, **kwargs):
        raise hermes.EngineError("at first")

    def fail_again(*args, **kwargs):
        raise hermes.EngineError("again")

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        fleet.start()
        with monkeypatch.context() as patch:
            patch.setattr("hermes.fleet.fleet.measure_candidate", fail)
            patch.setattr(fleet._shares, "settle", fail_again)
            with pytest.raises(hermes.EngineError, match="at first"):
                fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))
            with pytest.raises(hermes.EngineError, match="again"):
                fleet.submit("small", PIXELS)
        assert answers(fleet, nets, "small")


def test_a_newcomer_that_fails_after_it_has_joined_can_come_again(nets, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        fleet.start()
        real = fleet._turns.join
        with monkeypatch.context() as patch:
            patch.setattr(fleet._turns, "join", lambda *args: (real(*args), interrupt()))
            with pytest.raises(KeyboardInterrupt):
                fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))
        assert answers(fleet, nets, "small")
        fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))
        assert answers(fleet, nets, "other")
        assert answers(fleet, nets, "small")


def test_weights_belong_to_one_model(nets):
    with hermes.Fleet(budget="1GiB") as fleet:
        net = skeleton("small")
        fleet.add("one", net, nets["small"][1], example_args=(PIXELS,))
        with pytest.raises(hermes.InputError, match=r"two: .*'one' already"):
            fleet.add("two", net, nets["small"][1], example_args=(PIXELS,))
        other = skeleton("small")
        other.head = net.head
        with pytest.raises(hermes.InputError, match=r"two: .*'one' already"):
            fleet.add("two", other, nets["small"][1], example_args=(PIXELS,))
        fleet.remove("one")
        fleet.add("two", net, nets["small"][1], example_args=(PIXELS,))
        assert torch.equal(fleet.submit("two", PIXELS).result(60), expected(nets, "small", PIXELS))


def test_what_stops_the_daemon_stops_the_fleet(nets, monkeypatch):
    def fail(limit_bytes):
        raise ZeroDivisionError("odd")

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        fleet.start()
        assert answers(fleet, nets, "small")
        monkeypatch.setattr(fleet._shares._working_set, "trimmed", fail)
        fleet._shares._daemon.join(20)
        for _ in range(2):
            assert "odd" in str(fleet.submit("small", PIXELS).exception(60))
        assert "odd" in fleet.report().models["small"].failure
        with pytest.raises(hermes.EngineError, match="odd"):
            fleet.add("other", skeleton("other"), nets["other"][1], example_args=(PIXELS,))


def test_a_request_that_outgrows_the_budget_is_ended_and_the_model_goes_on(nets, monkeypatch):
    def passes(module):
        while True:
            module(PIXELS)

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        fleet.start()
        assert answers(fleet, nets, "small")
        with monkeypatch.context() as patch:
            patch.setattr(fleet._shares._working_set, "trimmed", lambda limit_bytes: fleet.budget_bytes + 200 * MIB)
            with pytest.raises(hermes.BudgetError, match=r"small: .* larger input .* try --budget") as ended:
                fleet.call("small", passes).result(60)
            assert ended.value.minimum_bytes > fleet.budget_bytes
        assert answers(fleet, nets, "small")
        assert fleet.report().models["small"].failure is None


def test_a_callback_does_not_wait_for_itself(nets):
    """It runs on the thread that computes, for which each of these would wait."""
    refused = []

    def change(future):
        for act in (fleet.close, fleet.start, lambda: fleet.remove("small")):
            try:
                act()
            except hermes.InputError as error:
                refused.append(str(error))

    with fleet_of(nets, ["small"], spare_bytes=28 * MIB) as fleet:
        gate = threading.Event()
        future = fleet.call("small", lambda module: gate.wait(60))
        future.add_done_callback(change)
        gate.set()
        assert answers(fleet, nets, "small")
        assert len(refused) == 3
        assert "another thread" in refused[0]


def test_a_request_of_a_callback_while_the_fleet_closes_is_refused(nets):
    refused = []

    def again(future):
        try:
            fleet.submit("small", PIXELS)
        except hermes.InputError as error:
            refused.append(str(error))

    fleet = fleet_of(nets, ["small"], spare_bytes=28 * MIB)
    gate = threading.Event()
    future = fleet.call("small", lambda module: gate.wait(60))
    future.add_done_callback(again)
    closing = threading.Thread(target=fleet.close, daemon=True)
    closing.start()
    while not fleet._closed:
        time.sleep(0.001)
    gate.set()
    closing.join(60)
    assert not closing.is_alive()
    assert refused == ["the fleet is closed; make a new one"]
