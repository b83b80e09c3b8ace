import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from tests.tiny import tiny_dali
from tests.trainers.stages import clips, picture, state, wav
from trainers.dali.data_collator import AlignmentCollator, DaliDataCollator, augment
from trainers.rows import SkippedSamples, TooManySkippedError, read_audio, require_columns, without_decoding
from trainers.stage import EpochSampler, Rows, StreamedRows

BAD_SOUND = {"bytes": b"no sound at all", "path": None}


@pytest.fixture(scope="module")
def tiny():
    return tiny_dali()


def test_labels_are_the_captions_alone(tiny):
    model, processor = tiny
    batch = DaliDataCollator(processor)([{"id": "a", "audio": wav(0), "caption": "a dog barks"}])
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "a dog barks </s>"
    assert (batch["input_ids"][0] == processor.audio_token_id).sum() == 32
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("modality, inputs", [("audio", 1), ("image", 1), ("audio_image", 2)])
def test_modalities(tiny, modality, inputs):
    model, processor = tiny
    collator = DaliDataCollator(processor, modality)
    rows = list(Rows(clips(2)))
    batch = collator(rows)
    assert len(batch.keys() & {"pixel_values", "input_features"}) == inputs
    assert model(**batch).loss > 0


def test_every_way_to_give_sound(tmp_path):
    value = wav(3)
    expected = read_audio(value, 16_000)
    (tmp_path / "a.wav").write_bytes(value["bytes"])
    for same in (value["bytes"], str(tmp_path / "a.wav"), tmp_path / "a.wav", {"path": str(tmp_path / "a.wav")}):
        np.testing.assert_array_equal(read_audio(same, 16_000), expected)
    array = {"array": expected, "sampling_rate": 16_000}
    np.testing.assert_array_equal(read_audio(array, 16_000), expected)
    assert len(read_audio(value, 8_000)) == len(expected) // 2


@pytest.mark.parametrize(
    "broken",
    [{"audio": BAD_SOUND}, {"audio": None}, {"audio": {"path": "/nowhere.wav", "bytes": None}}, {"caption": " "}],
    ids=["bytes", "none", "path", "caption"],
)
def test_an_undecodable_sample_weighs_nothing(tiny, broken, caplog):
    model, processor = tiny
    collator = DaliDataCollator(processor)
    good = {"id": "good", "audio": wav(0), "caption": "a dog barks"}
    batch = collator([good, good | {"id": "broken"} | broken])
    assert (batch["labels"][1] == -100).all()
    torch.testing.assert_close(model(**batch).loss, model(**collator([good])).loss)
    assert (collator.skips.seen, collator.skips.skipped) == (3, 1)
    assert "broken is skipped" in caplog.text


def test_nan_and_too_short_sounds_are_skipped(tiny):
    collator = AlignmentCollator(tiny[1], max_skipped=0.5)
    array = {"array": np.full(16_000, np.nan, np.float32), "sampling_rate": 16_000}
    short = {"array": np.zeros(100, np.float32), "sampling_rate": 16_000}
    rows = [{"id": i, "audio": value, "image": picture(0)} for i, value in enumerate([array, short, wav(0)])]
    assert collator(rows)["pair_weight"].tolist() == [0, 0, 1]


def test_too_many_undecodable_samples_stop_the_run(tiny):
    collator = DaliDataCollator(tiny[1], max_skipped=0.02)
    rows = [{"id": "x", "audio": BAD_SOUND, "caption": "a"}]
    collator(rows)
    collator(rows)
    with pytest.raises(TooManySkippedError, match=r"3 of 3 samples .* more than 2.0% .* the last was x"):
        collator(rows)


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 0.3))
@settings(deadline=None, max_examples=30)
def test_the_share_of_skipped_samples(broken, share):
    skips = SkippedSamples(share)
    for seen, bad in enumerate(broken, 1):
        limit = skips.skipped + bad > share * max(seen, 100)

        def read(row, bad=bad):
            if bad:
                raise ValueError("broken")
            return row

        if bad and limit:
            with pytest.raises(TooManySkippedError):
                skips.attempt(read, {"id": 0})
            return
        assert (skips.attempt(read, {"id": 0}) is None) == bad
    assert (skips.seen, skips.skipped) == (len(broken), sum(broken))


def test_workers_share_the_count(tiny):
    rows = without_decoding(clips(8)).to_list()
    rows[3]["audio"] = BAD_SOUND
    collator = DaliDataCollator(tiny[1])
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collator)
    assert sum(len(batch["labels"]) for batch in loader) == 8
    assert (collator.skips.seen, collator.skips.skipped) == (8, 1)


def test_missing_columns_are_named(tiny):
    with pytest.raises(ValueError, match=r"no column `audio`; its columns are id"):
        require_columns([{"id": 1}], [("audio",)], "training")
    with pytest.raises(ValueError, match="`image` or `frames`"):
        require_columns(clips(1).remove_columns(["image", "frames"]), [("image", "frames")], "training")
    with pytest.raises(ValueError, match="evaluation is empty"):
        require_columns(clips(1).select([]), [("audio",)], "evaluation")
    with pytest.raises(ValueError, match="remove_unused_columns"):
        DaliDataCollator(tiny[1])([{"id": 1}])


def test_training_rows_are_random_by_epoch_and_nothing_else(tiny):
    collator = AlignmentCollator(tiny[1])
    rows = Rows(clips(4, frames=5))

    def batch(epoch, order=(0, 1, 2, 3)):
        return collator([rows[(epoch, index)] for index in order])

    first, again, later = batch(0), batch(0, (3, 2, 1, 0)), batch(1)
    for name in ("input_features", "pixel_values"):
        torch.testing.assert_close(first[name], again[name].flip(0), rtol=0, atol=0)
        assert (first[name] != later[name]).any()
    plain = collator([rows[i] for i in range(4)])
    torch.testing.assert_close(plain["input_features"], collator([rows[i] for i in range(4)])["input_features"])
    middle = collator([{"id": 0, "audio": wav(0), "image": clips(1, frames=5)[0]["frames"][2]}])
    torch.testing.assert_close(plain["pixel_values"][0], middle["pixel_values"][0])


def test_cached_features_are_those_of_the_first_reading(tiny, monkeypatch):
    plain, cached = AlignmentCollator(tiny[1]), AlignmentCollator(tiny[1], cache_features=True)
    rows = clips(4)

    def batch(collator, epoch):
        return collator([{**rows[i], "epoch": epoch, "index": i} for i in range(4)])["input_features"]

    wanted = [batch(plain, epoch) for epoch in range(2)]
    assert torch.equal(batch(cached, 0), wanted[0])
    monkeypatch.setattr("trainers.dali.data_collator.read_audio", lambda *args: pytest.fail("read again"))
    assert torch.equal(batch(cached, 1), wanted[1])  # augmented anew, and the cache is not what was augmented
    with pytest.raises(pytest.fail.Exception, match="read again"):
        cached([{**rows[0], "index": 0}])  # rows of an evaluation may be others with the same index


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(deadline=None, max_examples=25)
def test_augmentation_is_noise_and_a_roll(seed, heard):
    features = torch.arange(64.0)[:, None].repeat(1, 32)
    mask = (torch.arange(64) < heard).long()
    rolled, rolled_mask = augment(features, mask, np.random.default_rng(seed))
    shift = int(rolled[:, 0].argmin())
    noise = rolled.roll(-shift, 0) - features
    assert noise.min() >= 0 and noise.max() < 0.1
    torch.testing.assert_close(rolled_mask.roll(-shift), mask)


def test_orders_follow_from_seed_and_epoch():
    sampler = EpochSampler(20, seed=1)
    first = list(sampler)
    assert first == list(EpochSampler(20, seed=1)) and sorted(index for _, index in first) == list(range(20))
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != [index for _, index in first]
    assert {epoch for epoch, _ in sampler} == {1}


def test_a_stream_that_ends_early_is_an_error():
    stream = StreamedRows([{"id": 1}, {"id": 2}], length=3)
    with pytest.raises(ValueError, match="ends after 2 rows, but `train_rows` says 3"):
        list(stream)
    assert [row["index"] for row in StreamedRows([{"id": 1}, {"id": 2}], length=1)] == [0]


def test_plain_trainer_fine_tunes_a_model(tmp_path):
    model, processor = tiny_dali()
    before = state(model)
    arguments = TrainingArguments(
        str(tmp_path),
        remove_unused_columns=False,
        num_train_epochs=10,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=without_decoding(clips(8)), data_collator=DaliDataCollator(processor)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
