"""The control groups' limits of processor time: both versions, groups within groups, containers."""

import pytest

from tinygrad_bn.kernels.cpu.quota import cpu_quota

HALF_MORE = "150000 100000\n"


def version_1(quota, period=100_000):
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": HALF_MORE}, 1.5),
        ("0::/", {"cpu.max": "50000 100000\n"}, 0.5),
        # As systemd's CPUQuota= sets it, for a service or a slice of them: the smallest counts.
        ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": HALF_MORE}, 1.5),
        ("0::/a.slice/b.service", {"a.slice/cpu.max": HALF_MORE}, 1.5),
        (
            "0::/a.slice/b.service",
            {"a.slice/cpu.max": HALF_MORE, "a.slice/b.service/cpu.max": "400000 100000\n"},
            1.5,
        ),
        ("0::/a.slice", {"other.slice/cpu.max": HALF_MORE}, None),
        # In a container that sees its own group as the root, under the host's name for it.
        ("0::/docker/0123", {"cpu.max": HALF_MORE}, 1.5),
        ("0::/../../..", {"cpu.max": HALF_MORE}, 1.5),
        ("3:cpu,cpuacct:/", version_1(-1), None),
        ("3:cpu,cpuacct:/", version_1(200_000), 2.0),
        ("3:cpu,cpuacct:/docker/0123", version_1(25_000), 0.25),
        ("9:cpuset:/\n3:cpu:/\n0::/", version_1(200_000), 2.0),
        ("3:memory:/", version_1(200_000), None),
        ("0::/", {"cpu.max": "what is this\n"}, None),
        ("0::/", {"cpu.max": "100000 0\n"}, None),
        ("0::/", {"cpu.max": ""}, None),
    ],
)
def test_the_smallest_limit_of_the_groups_counts(tmp_path, membership, files, expected):
    (tmp_path / "membership").write_text(membership + "\n")
    folder = tmp_path / "cgroup"
    for name, text in files.items():
        controller = "" if name.endswith("cpu.max") else "cpu"
        place = folder / controller / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    assert cpu_quota(folder, tmp_path / "membership") == expected


def test_where_there_are_no_control_groups_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "nothing here") is None
