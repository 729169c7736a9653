"""What is measured of a stage in an epoch."""

from dataclasses import dataclass


@dataclass(slots=True)
class Measures:
    """How a stage spent an epoch: seconds, bytes, and the staleness of its backwards in updates.

    Where only the sum of all waiting is known, it is `wait_other_s`, and `is_itemised` is false.
    """

    seconds: float = 0.0
    is_itemised: bool = True
    wait_other_s: float = 0.0
    wait_data_s: float = 0.0
    wait_forward_s: float = 0.0
    wait_backward_s: float = 0.0
    wait_replicas_s: float = 0.0
    bytes_sent_forward: int = 0
    bytes_sent_backward: int = 0
    staleness_sum: int = 0
    backwards: int = 0

    @property
    def compute_s(self) -> float:
        """The seconds in which the stage waited for nobody."""
        waits = self.wait_data_s + self.wait_forward_s + self.wait_backward_s + self.wait_replicas_s
        return max(0.0, self.seconds - waits - self.wait_other_s)

    @property
    def staleness_updates(self) -> float:
        """The mean number of updates between a forward and its backward."""
        return self.staleness_sum / self.backwards if self.backwards else 0.0
