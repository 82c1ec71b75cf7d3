"""The condition of image to video: which channel says what."""

import torch

from turbodiff.sampling.conditioning import image_condition, picture_video


def test_picture_comes_first_and_grey_follows():
    image = torch.rand(1, 3, 16, 32)
    video = picture_video(image, 9)
    assert video.shape == (1, 3, 9, 16, 32)
    assert torch.equal(video[:, :, 0], image) and not video[:, :, 1:].any()


def test_mask_marks_the_given_latent_frame_and_latents_follow_it():
    latents = torch.randn(2, 16, 3, 2, 4)
    condition = image_condition(latents)
    assert condition.shape == (2, 20, 3, 2, 4)
    assert (condition[:, :4, 0] == 1).all() and not condition[:, :4, 1:].any()
    assert torch.equal(condition[:, 4:], latents)


def test_an_end_picture_is_the_last_frame_and_one_channel_of_the_last_latent_frame():
    first, last, latents = torch.rand(1, 3, 16, 32), torch.rand(1, 3, 16, 32), torch.randn(1, 16, 3, 2, 4)
    video = picture_video(first, 9, last)
    assert torch.equal(video[:, :, 0], first) and torch.equal(video[:, :, -1], last) and not video[:, :, 1:-1].any()
    mask = image_condition(latents, last=True)[:, :4]
    assert (mask[:, :, 0] == 1).all() and not mask[:, :, 1].any()
    assert not mask[:, :3, 2].any() and (mask[:, 3, 2] == 1).all()
