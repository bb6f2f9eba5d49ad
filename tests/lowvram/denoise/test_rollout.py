from lowvram.denoise.rollout import cond_rope_distance


def test_random_distance_is_seeded_and_in_range():
    drawn = [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert drawn == [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert set(drawn) == set(range(4, 31))
    assert cond_rope_distance(17, 420, 3, 2) == 17
