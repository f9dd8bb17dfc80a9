"""One file per paper, read top to bottom: settings, equations, trainer."""
