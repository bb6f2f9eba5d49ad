"""Published files, fetched from a hub when somebody asks for it, and at no other time."""
