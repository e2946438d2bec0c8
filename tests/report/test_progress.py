from hermes.engine import EngineStats
from hermes.report.progress import ProgressLine, show_progress


def test_the_line_says_pass_block_rate_and_memory():
    seconds = iter([0.0, 0.5, 1.0, 2.0])
    stats = EngineStats()
    line = ProgressLine(stats, num_blocks=24, num_passes=8, budget_bytes=700 << 20, clock=lambda: next(seconds))
    assert line().startswith("pass 1/8 · 0 MB/s · ")
    stats.bytes_read, stats.current_block, stats.passes = 50_000_000, 3, 2
    assert line().startswith("pass 3/8 · block 4/24 · 50 MB/s · ")
    stats.bytes_read, stats.passes = 150_000_000, 8
    text = line()
    assert text.startswith("pass 8/8 · block 4/24 · 100 MB/s · ")
    assert text.endswith(" of 700 MiB")


def test_without_a_terminal_text_goes_straight_through(capsys):
    with show_progress(lambda: "never drawn") as say:
        say("one ")
        assert capsys.readouterr().out == "one "
        say("two")
    assert capsys.readouterr() == ("two", "")
