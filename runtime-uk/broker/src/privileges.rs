//! What the process gives up before it listens to a guest: other identities, new privileges, core dumps, more files.
//!
//! A driver needs device files and the guest's RAM file; both are open by then. A system-call filter is the service
//! manager's to set (docs/security.md has one for systemd), because what libcuda calls differs from release to release.

use std::io;

/// A user and a group to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Files that may still be opened: drivers open some while they work.
const MAX_FILES: u64 = 256;

/// Gives up what is not needed. With an identity, becomes that user for good.
pub fn drop(identity: Option<Identity>) -> io::Result<()> {
    let check = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    if let Some(Identity { uid, gid }) = identity {
        // Groups first: they cannot be changed by the user that we become.
        // SAFETY: an empty list; numbers.
        check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
        // SAFETY: numbers only.
        check(unsafe { libc::setresgid(gid, gid, gid) })?;
        // SAFETY: numbers only.
        check(unsafe { libc::setresuid(uid, uid, uid) })?;
    }
    // SAFETY: numbers only. No program that we start could gain anything.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: numbers only. A guest's data is not written to disk, nor shown to a debugger.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    for (resource, most) in [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_NOFILE, MAX_FILES)] {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a valid place for the result.
        check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
        let lower = libc::rlimit { rlim_cur: limit.rlim_cur.min(most), rlim_max: limit.rlim_max.min(most) };
        // SAFETY: a valid value.
        check(unsafe { libc::setrlimit(resource, &raw const lower) })?;
    }
    Ok(())
}
