//! The processors that the cgroups of this process may use.
//!
//! A container on a large machine often sees all processors and has a quota of a few: `docker run
//! --cpus 1.5` is 150 ms of processor time in each period of 100 ms. More threads than that do not
//! finish sooner, they spend the quota early and then all stand still until the period ends.
//! `std::thread::available_parallelism` reads quotas too, but rounds them down and expects version 2
//! at `/sys/fs/cgroup`, see cgroups(7) and the kernel's cgroup-v2.rst and sched-bwc.rst.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The smallest quota of this process's cgroups and of those around them, in processors, rounded
/// up. None if there is none, as outside of Linux.
pub fn cpu_quota() -> Option<usize> {
    quota_below(Path::new("/"))
}

/// The same with all files looked up below `root`, `/` except in tests.
fn quota_below(root: &Path) -> Option<usize> {
    let cgroups = read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mounts = read_to_string(root.join("proc/self/mountinfo")).ok()?;
    let mut quotas = Vec::new();
    // A line is "hierarchy:controllers:path", with no controllers in version 2. Both versions may be
    // there; only one of them then has the quota files.
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let is_v2 = controllers.is_empty();
        if !is_v2 && !has_cpu(controllers) {
            continue;
        }
        for (mount, mut group) in mounts.lines().filter_map(|line| place(line, is_v2, path)) {
            // A group gets no more than each of the groups around it, up to the mount.
            let mount = root.join(mount.trim_start_matches('/'));
            loop {
                let directory = mount.join(&group);
                quotas.extend(if is_v2 { quota_v2(&directory) } else { quota_v1(&directory) });
                if !group.pop() {
                    break;
                }
            }
        }
    }
    quotas.into_iter().min()
}

/// Where a line of mountinfo mounts cgroups of the version, and the group of `path` below it.
fn place<'m>(line: &'m str, is_v2: bool, path: &str) -> Option<(&'m str, PathBuf)> {
    // 32 31 0:29 /root/of/mount /sys/fs/cgroup/cpu rw,relatime shared:1 - cgroup cgroup rw,cpu
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (mount_root, mount_point) = (mount.next()?, mount.next()?);
    let is_wanted = match filesystem.split(' ').next()? {
        "cgroup2" => is_v2,
        "cgroup" => !is_v2, // only the one of the cpu controller has the files
        _ => false,
    };
    // The mount of a container may begin at the container's group, which `path` then repeats. If it
    // begins elsewhere, the group is out of sight, and the mount's root is the best that is known.
    let group = Path::new(path).strip_prefix(mount_root).unwrap_or(Path::new(""));
    let is_inside = !group.components().any(|part| part.as_os_str() == "..");
    is_wanted.then(|| (mount_point, if is_inside { group.into() } else { PathBuf::new() }))
}

/// Whether a list like "cpu,cpuacct" names the controller of processor time.
fn has_cpu(controllers: &str) -> bool {
    controllers.split(',').any(|controller| controller == "cpu")
}

/// cpu.max is "150000 100000", microseconds in each period, or "max 100000".
fn quota_v2(directory: &Path) -> Option<usize> {
    let text = read_to_string(directory.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    processors(quota, period)
}

/// The same in two files; the quota is -1 if there is none.
fn quota_v1(directory: &Path) -> Option<usize> {
    let quota = read_to_string(directory.join("cpu.cfs_quota_us")).ok()?;
    let period = read_to_string(directory.join("cpu.cfs_period_us")).ok()?;
    processors(&quota, &period)
}

fn processors(quota: &str, period: &str) -> Option<usize> {
    let (quota, period): (usize, usize) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (period > 0).then(|| quota.div_ceil(period).max(1))
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, remove_dir_all, write};
    use std::process;

    use super::*;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const V1: &str = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n";

    /// The quota found where there are these files of /proc/self and these others.
    fn quota(name: &str, cgroup: &str, mountinfo: &str, files: &[(&str, &str)]) -> Option<usize> {
        let root = std::env::temp_dir().join(format!("rustbpe-quota-{}-{name}", process::id()));
        let of_process = [("proc/self/cgroup", cgroup), ("proc/self/mountinfo", mountinfo)];
        for (path, content) in of_process.iter().chain(files) {
            let path = root.join(path);
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, content).unwrap();
        }
        let found = quota_below(&root);
        remove_dir_all(root).unwrap();
        found
    }

    #[test]
    fn version_2_takes_the_smallest_of_the_groups_around() {
        let files = [
            ("sys/fs/cgroup/cpu.max", "800000 100000\n"),
            ("sys/fs/cgroup/pod/cpu.max", "250000 100000\n"), // 2.5
            ("sys/fs/cgroup/pod/app/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/pod/other/cpu.max", "50000 100000\n"),
        ];
        assert_eq!(quota("app", "0::/pod/app\n", V2, &files), Some(3));
        assert_eq!(quota("other", "0::/pod/other\n", V2, &files), Some(1));
        assert_eq!(quota("root", "0::/\n", V2, &files), Some(8));
        assert_eq!(quota("unlimited", "0::/pod/app\n", V2, &files[2..3]), None);
    }

    #[test]
    fn version_1_takes_the_group_of_the_cpu_controller() {
        let group = "7:cpuset:/set\n4:cpu,cpuacct:/a/b\n0::/\n";
        let files = [
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "160000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "50000\n"), // 3.2
            ("sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/set/cpu.cfs_quota_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/set/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(quota("v1", group, V1, &files), Some(4));
        assert_eq!(quota("v1-none", group, V1, &files[..2]), None);
    }

    #[test]
    fn a_container_sees_its_group_as_the_root_of_the_mount() {
        let mount = V2.replace("0:26 / ", "0:26 /docker/3f ");
        let files =
            [("sys/fs/cgroup/cpu.max", "50000 100000"), ("sys/fs/cgroup/in/cpu.max", "0 0")];
        assert_eq!(quota("bound", "0::/docker/3f\n", &mount, &files), Some(1));
        assert_eq!(quota("inner", "0::/docker/3f/in\n", &mount, &files), Some(1));
        assert_eq!(quota("other-root", "0::/docker/4a\n", &mount, &files), Some(1));
        assert_eq!(quota("elsewhere", "0::/../../x\n", &mount, &files), Some(1));
        assert_eq!(quota("outside", "0::/../x\n", V2, &files), Some(1));
    }

    #[test]
    fn no_cgroups_no_quota() {
        assert_eq!(quota_below(Path::new("/no/such/directory")), None);
        assert_eq!(quota("empty", "", "", &[]), None);
        assert_eq!(quota("odd", "x\n0::/\n", V2, &[("sys/fs/cgroup/cpu.max", "max\n")]), None);
    }
}
