"""Where the sound is: weights and plans against the losses' own, and the command."""

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from examples.sounding_world.samples import write_video
from modeling_dali.explain import (
    Scorers,
    explain,
    find_scorers,
    heat,
    log_nearest_plan,
    over_picture,
    save_scorers,
    squared_distances,
)
from tests.tiny import tiny_dali
from tests.trainers.stages import clips, settings
from trainers.dali import cli
from trainers.dali.alignment import AlignmentConfig, AlignmentTrainer
from trainers.losses import TransportScorer, optimal_transport

SOUND = (np.random.default_rng(0).standard_normal(10_000) * 0.1).astype(np.float32)
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def new_scorers(folder, heads=8) -> TransportScorer:
    torch.manual_seed(3)
    scorer = TransportScorer(24, heads)
    save_scorers(folder, scorer.state_dict(), heads)
    return scorer


@pytest.mark.parametrize("heads", [None, 2, 8])
def test_scorers_weigh_as_in_training(tmp_path, heads):
    scorer = new_scorers(tmp_path, heads)
    audio, image = torch.randn(1, 9, 24), torch.randn(1, 5, 24)
    wanted = scorer(audio, image)
    found = Scorers(tmp_path / "scorer.safetensors")(audio[0], image[0])
    for theirs, ours in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs[0].detach())


def test_explanation_is_the_optimal_plan_between_learned_weights(tmp_path):
    model, processor = tiny_dali()
    scorer = new_scorers(tmp_path, 2)
    found = explain(model, processor, SOUND, PICTURE, find_scorers(tmp_path))
    assert found.learned and found.image_weights.shape == (4, 4) and found.audio_weights.shape == (4, 8)
    features = processor.feature_extractor([SOUND], sampling_rate=16_000)["input_features"]
    pixels = processor.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        audio, image = model.model.get_audio_tokens(features), model.get_image_tokens(pixels)
        alpha, beta = scorer(audio, image)
        transport = optimal_transport(audio, image, alpha, beta, return_plan=True)
    np.testing.assert_allclose(found.image_weights.ravel(), beta[0], rtol=1e-4)
    np.testing.assert_allclose(found.plan, transport.plan[0], atol=1e-6)


def test_without_scorers_tokens_go_where_they_are_near(tmp_path):
    assert find_scorers(tmp_path) is None
    image = torch.eye(6)[:4] * 5
    audio = image[[2, 2, 1]] + 0.01
    plan = log_nearest_plan(audio, image).exp()
    np.testing.assert_allclose(plan.sum(1), 1 / 3)
    np.testing.assert_allclose(plan.sum(0), [0, 1 / 3, 2 / 3, 0], atol=1e-3)
    np.testing.assert_allclose(squared_distances(audio, image)[0, 0], 50, rtol=0.01)
    model, processor = tiny_dali()
    found = explain(model, processor, SOUND, PICTURE)
    assert not found.learned
    np.testing.assert_allclose(found.image_weights.ravel(), found.plan.sum(0))


def test_the_sound_is_where_it_brings_more_than_silence():
    """Two thirds of the audio tokens are at home on token 0, the background; what is heard is token 2."""
    image = torch.eye(6)[:4] * 5
    silence = image[[0, 0, 0]] + 0.01
    sound = image[[0, 0, 2]] + 0.01
    plans = [log_nearest_plan(tokens, image) for tokens in (sound, silence)]
    with_sound, without = (plan.logsumexp(0) for plan in plans)
    assert with_sound.argmax() == 0
    where = with_sound - without
    assert where.argmax() == 2 and where[0] < 0
    np.testing.assert_allclose(where.exp(), plans[0].exp().sum(0) / plans[1].exp().sum(0), rtol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_silence_is_nowhere(tmp_path, learned):
    model, processor = tiny_dali()
    new_scorers(tmp_path, 2)
    scorers = find_scorers(tmp_path) if learned else None
    found = explain(model, processor, np.zeros_like(SOUND), PICTURE, scorers)
    assert found.where.shape == (4, 4) and not found.where.any()
    assert explain(model, processor, SOUND, PICTURE, scorers).where.any()


def test_heat_is_bright_where_weights_are_large():
    weights = np.zeros((4, 4))
    weights[0, 3] = 1
    for picture in (
        heat(weights, (64, 64)),
        over_picture(Image.new("RGB", (8, 8), "white"), weights).resize((64, 64)),
    ):
        grey = np.asarray(picture.convert("L"))
        assert grey[:16, 48:].mean() > 1.5 * grey[32:, :32].mean()
    assert np.ptp(np.asarray(heat(np.ones((2, 2)), (8, 8)))[..., 0]) == 0  # all the same is no error


def test_command_writes_a_picture_for_each_file(tmp_path, capsys):
    model, processor = tiny_dali()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    buffer = io.BytesIO()
    soundfile.write(buffer, SOUND, 16_000, format="WAV")
    write_video(tmp_path / "clip.mp4", buffer.getvalue(), PICTURE)
    (tmp_path / "sound.wav").write_bytes(buffer.getvalue())
    files = [str(tmp_path / name) for name in ("missing.mp4", "sound.wav", "clip.mp4")]
    command = ["explain", *files, "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "missing.mp4: missing: no such file" in err and "sound.wav" in err and "2 of 3" in err
    assert "No scorer.safetensors" in err
    assert out.split() == [str(tmp_path / "out" / "clip.where.png")]
    assert Image.open(tmp_path / "out" / "clip.where.png").size[0] > 1000
    PICTURE.save(tmp_path / "picture.png")
    new_scorers(tmp_path / "model")
    rest = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert cli.main(["explain", files[1], *rest, "--image", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "out" / "sound.where.png").exists() and "No scorer" not in capsys.readouterr().err
    assert cli.main(["explain", files[2], *rest, "--start", "60"]) == 1
    assert "ends before 60 s" in capsys.readouterr().err
    assert cli.main(["explain", files[2], "--model", str(tmp_path / "nothing")]) == 1


def test_scorers_of_a_trained_model_keep_their_settings(tmp_path):
    model, processor = tiny_dali()
    options = settings(tmp_path, scorer_heads=4, scorer_temperature=2.5, uniform_mix=0.25)
    trainer = AlignmentTrainer(model, AlignmentConfig(**options, save_strategy="no"), processor, clips(2))
    trainer.save_model()
    scorers = find_scorers(tmp_path)
    assert (scorers.heads, scorers.temperature, scorers.uniform_mix) == (4, 2.5, 0.25)
    audio, image = torch.randn(7, 24), torch.randn(5, 24)
    with torch.no_grad():
        alpha, beta = trainer.model.scorer(audio[None], image[None])
    torch.testing.assert_close(torch.cat(scorers(audio, image)), torch.cat([alpha[0], beta[0]]))
