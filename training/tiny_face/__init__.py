"""Training of the tiny model that draws talking faces; ``models/tiny_face/README.md`` is its model card."""
