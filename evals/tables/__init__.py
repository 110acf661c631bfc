"""Tables of many runs: arms, students, tasks and seeds over one store."""
