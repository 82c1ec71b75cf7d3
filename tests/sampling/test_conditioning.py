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
