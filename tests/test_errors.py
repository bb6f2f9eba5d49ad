from lowvram_kernels import errors


def test_every_error_has_the_one_base_and_an_exit_code():
    children = [e for e in vars(errors).values() if isinstance(e, type) and e is not errors.LowvramError]
    assert len(children) >= 6
    assert all(issubclass(e, errors.LowvramError) and e.exit_code in (1, 2) for e in children)
