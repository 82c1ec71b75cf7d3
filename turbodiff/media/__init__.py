"""PIXELS <-> FILES: clips out, pictures in.

Lives here: the H.264 writer, the check of what was written, the library of finished clips, the picture reader.
Never here: torch, devices, decisions about size or memory.
Who may knock: `turbodiff.runtime` (all of it); `turbodiff.jobs`, `turbodiff.studio` (library, tags, images).
"""
