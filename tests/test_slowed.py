import pytest
from support.printed_tables import rows_of

from ffssl.demo import print_table
from ffssl.slowed import describe_slowed


def log(epochs, seconds, flops, resolution=lambda epoch: 48, first=0):
    """Rows as training logs them: sums. seconds, flops: of each epoch."""
    rows, spent = [{"epoch": 0, "seconds": 0.0, "flops": 0, "knn": 0.2}][first:], [0.0, 0]
    for epoch in range(1, epochs + 1):
        spent = [spent[0] + seconds(epoch), spent[1] + flops(epoch)]
        rows.append(
            {
                "epoch": epoch,
                "seconds": spent[0],
                "flops": spent[1],
                "resolution": resolution(epoch),
                "knn": 0.9,
            }
        )
    return rows


def steady(epoch):
    return 10.0 - epoch % 2  # as a machine's moods are


def slow(*epochs):
    return lambda epoch: steady(epoch) * (10 if epoch in epochs else 1)


def work(epoch):
    return 2_000_000


def test_epochs_slowed_tenfold_are_told_and_no_others():
    logs = {
        "a": log(15, steady, work),
        "b": log(8, slow(3, 4), work),
        "c": log(8, slow(*range(9)), work),
        "d": log(4, slow(2), work, first=1),
    }
    told = describe_slowed(logs)
    assert [sentence.partition(" took ")[0] for sentence in told] == [
        "b: 2 of 8 epochs",
        "c: 8 of 8 epochs",
        "d: epoch 2",
    ]
    # 100 s against 9.
    assert all(
        "took up to 11.1 times as long for the same FLOPs as" in sentence for sentence in told
    )


def test_a_cheaper_epoch_or_one_of_another_resolution_is_not_slow():
    flops = {32: 1_000_000, 48: 3_000_000}

    def side(epoch):
        return 32 if epoch < 5 else 48

    # Four times as long for a FLOP at 32 px.
    run = log(8, lambda epoch: 12.0 if epoch < 5 else 9.0, lambda epoch: flops[side(epoch)], side)
    assert (
        describe_slowed({"a": run, "b": log(8, lambda epoch: 30.0, lambda epoch: 9_000_000)}) == []
    )
    assert describe_slowed({"a": run[:1], "b": []}) == []  # nothing trained yet


@pytest.mark.parametrize("slowed, speed_up", [((), "1.90x"), (range(9), "0.19x")])
def test_the_demos_table_keeps_its_form_and_says_what_its_seconds_are_worth(
    capsys, slowed, speed_up
):
    logs = {
        "baseline": log(15, lambda epoch: 10.0, work),
        "efficient": log(8, lambda epoch: 98.6842 if slowed else 9.86842, work),
    }
    print_table(logs, 0.186)
    table, _, told = capsys.readouterr().out.partition("\n\nTFLOP")
    row = rows_of(table)[-1]
    assert len(row) == 7 and row[6] == speed_up
    assert ("efficient: 8 of 8 epochs took up to 9.9 times as long" in told) == bool(slowed)
