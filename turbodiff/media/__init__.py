"""PIXELS <-> FILES: clips out, pictures in.

Contents: the H.264 writer, the check of what was written, tags of an mp4, the reader of pictures.
Never here: torch, devices, decisions about memory.
Used by: `turbodiff.runtime` (all of it); `turbodiff.archive`, `turbodiff.studio` (pictures, tags, ffmpeg).
"""
