//! Protection of the memory of a process that holds keys.

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};

/// Makes sure that no copy of this process's memory reaches a disk or another process of the same
/// user: no core dump, no `ptrace`, no reading of `/proc/PID/mem`.
///
/// The files in `/proc/PID` belong to root afterwards. The process can still use those of
/// `/proc/self` that it needs, such as `exe` and `fd`. A child that executes another program
/// becomes dumpable again, but keeps the limit on core dumps.
pub fn forbid_dumps() {
    // Neither call can fail, since the process only gives up rights. A sandbox that returns EPERM
    // for `setrlimit` has set the limit already (`LimitCORE=0`).
    let _ = prctl::set_dumpable(false);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::getrlimit;

    #[test]
    fn a_process_that_forbids_dumps_has_none() {
        forbid_dumps();
        assert_eq!(prctl::get_dumpable(), Ok(false));
        assert_eq!(getrlimit(Resource::RLIMIT_CORE), Ok((0, 0)));
        std::env::current_exe().expect("a process still finds its own program");
    }
}
