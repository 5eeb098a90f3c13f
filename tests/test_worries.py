"""The warnings of a training run, in all four scripts: each comes where it should, and not on a run that is well."""
import pytest
import torch

import cgan_residual
import cspup128
import dcgan
import fashion_keras_port


@pytest.fixture(params=[dcgan, cspup128, cgan_residual, fashion_keras_port], ids=lambda script: script.SCRIPT)
def script(request):
    return request.param


def rows(count, d_real=0.55, d_fake=0.45):
    """Rows of metrics.csv, ten steps each."""
    return [dict(step=str(10 * i), loss_d="1", loss_g="1", d_real=str(d_real), d_fake=str(d_fake)) for i in range(count)]


def faces(different, count=64):
    """uint8 count,3,32,32 of so many different drawn faces, each with a little noise of its own."""
    drawn = [cspup128.draw_picture(i).resize((32, 32)) for i in range(different)]
    pictures = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in drawn])
    pictures = pictures.view(-1, 32, 32, 3).permute(0, 3, 1, 2)[torch.arange(count) % different].float()
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + 4 * noise).clamp(0, 255).byte()


@pytest.mark.parametrize("different, count, worried", [
    (64, 50, False), (52, 50, False), (40, 50, True), (16, 50, True), (6, 50, True), (1, 50, True), (6, 49, False)])
def test_samples_that_repeat_themselves(script, different, count, worried):
    """Pairs at a distance would not tell: six faces are as far apart, on average, as sixty-four."""
    found = list(script.worries(rows(count), faces(different), faces(64)))
    assert len(found) == worried and all("repeat themselves" in line for line in found)


def test_samples_are_measured_against_the_real_pictures_own_repeats(script):
    assert list(script.worries(rows(50), faces(6), faces(6))) == []


@pytest.mark.parametrize("ahead, count, said", [
    (0.97, 20, "has won"), (0.97, 19, None), (0.9, 20, None), (0.0, 20, "no better than chance"), (-0.1, 30, "chance"),
    (0.0, 19, None), (0.005, 20, None)])
def test_a_discriminator_that_has_won_or_only_guesses(script, ahead, count, said):
    found = list(script.worries(rows(count, 0.5 + ahead / 2, 0.5 - ahead / 2), faces(64), faces(64)))
    assert [said in line for line in found] == [True] * bool(said)


def test_only_the_last_200_steps_count_and_all_of_them(script):
    won, well = rows(20, 0.99, 0.01), rows(20)
    assert list(script.worries(won + well, faces(64), faces(64))) == []
    assert len(list(script.worries(well + won, faces(64), faces(64)))) == 1
    assert list(script.worries(well + won[1:] + well[:1], faces(64), faces(64))) == []
