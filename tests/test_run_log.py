import json

from ffssl.run_log import NAME, RunLog, read_log


def rows(*epochs):
    return [{"epoch": epoch, "loss": -epoch / 3} for epoch in epochs]


def write(folder, written, *, last_epoch):
    log = RunLog(folder, last_epoch=last_epoch, tensorboard=False)
    for row in written:
        log.write(row)
    log.close()


def test_rows_are_read_back_as_they_were_written(tmp_path):
    assert read_log(tmp_path) == []
    write(tmp_path, rows(0, 1, 2), last_epoch=-1)
    assert read_log(tmp_path) == rows(0, 1, 2)


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, last_epoch=-1, tensorboard=False)
    log.write(rows(0)[0])
    assert read_log(tmp_path) == rows(0)
    log.close()


def test_rows_after_the_checkpoint_are_dropped_and_the_log_goes_on(tmp_path):
    write(tmp_path, rows(0, 1, 2, 3), last_epoch=-1)
    write(tmp_path, [{"epoch": 2, "loss": 9.0}], last_epoch=1)
    assert read_log(tmp_path) == [*rows(0, 1), {"epoch": 2, "loss": 9.0}]


def test_a_new_run_starts_with_an_empty_log(tmp_path):
    write(tmp_path, rows(0, 1), last_epoch=-1)
    write(tmp_path, [], last_epoch=-1)
    assert read_log(tmp_path) == []


def test_a_last_line_cut_anywhere_is_no_row(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rows(0, 1, 2))
    for end in range(whole.index('{"epoch": 2') + 1, len(whole) - 1):
        (tmp_path / NAME).write_text(whole[:end])
        write(tmp_path, rows(2), last_epoch=2)
        assert read_log(tmp_path) == rows(0, 1, 2)


def test_the_log_of_a_run_that_is_writing_can_be_read(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in rows(0, 1, 2))
    (tmp_path / NAME).write_text(whole[:-5])
    assert read_log(tmp_path) == rows(0, 1)


def test_a_last_line_that_lacks_only_its_end_is_a_row(tmp_path):
    (tmp_path / NAME).write_text("\n".join(json.dumps(row) for row in rows(0, 1)))
    write(tmp_path, rows(2), last_epoch=1)
    assert read_log(tmp_path) == rows(0, 1, 2)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = RunLog(tmp_path, last_epoch=-1, tensorboard=True)
    for row in rows(0, 1, 2):
        log.write(row)
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("loss")] == [(0, 0.0), (1, -0.33333), (2, -0.66667)]
