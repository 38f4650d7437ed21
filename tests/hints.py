"""How a failing test teaches: what came, what was expected, and the slip that does that."""
import torch


def assert_close(seen, expected, hint, slips=(), **tolerance):
    """torch.testing.assert_close whose message is one line: two values, and the slip of `slips`,
    {hint: what the slip gives}, that gives what was seen, or else `hint`."""
    seen = torch.as_tensor(seen)
    expected = torch.as_tensor(expected, dtype=seen.dtype)
    for slip, given in dict(slips).items():
        given = torch.as_tensor(given, dtype=seen.dtype)
        if given.shape == seen.shape == expected.shape:
            far, near = (given - expected).abs().max(), (given - seen).abs().max()
            if near < .02 * far:
                hint = slip
                break
    torch.testing.assert_close(seen, expected, **tolerance,
                               msg=lambda _: f'{difference(seen, expected)}: {hint}')


def difference(seen, expected):
    """The two shapes, or else the two values that are farthest apart."""
    if seen.shape != expected.shape:
        return f'shape {tuple(seen.shape)} instead of {tuple(expected.shape)}'
    apart = (seen.double() - expected.double()).abs().nan_to_num(torch.inf)
    at = apart.flatten().argmax()
    return f'{seen.flatten()[at].item():.4g} instead of {expected.flatten()[at].item():.4g}'


def nearest_slip(seen, slips):
    """The slip of {hint: number} whose number is nearest to the one that is seen."""
    return min(slips, key=lambda slip: abs(slips[slip] - seen))
