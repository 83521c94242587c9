"""Child processes of a build: engines are compiled where a crash cannot take the build along."""
