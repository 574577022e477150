"""One file per backend: how its engines are built, and how they run."""
