//! System users, looked up by name in `/etc/passwd`.
//!
//! The file is read directly, because the programs are linked statically and the name service
//! switch of the C library needs shared libraries. `systemd-sysusers`, `useradd` and `adduser` all
//! write this file.

use std::io;
use std::path::Path;

/// Name of the user that the guard and the agent run as.
pub const AGENT: &str = "towline";
/// Name of the user that the controller runs as.
pub const CONTROLLER: &str = "towline-controller";
/// Path of the machine's list of users.
pub const PASSWD: &str = "/etc/passwd";

/// Longest `/etc/passwd` that is read, in bytes: tens of thousands of users.
const PASSWD_BYTES: u64 = 8 * 1024 * 1024;

/// User id and group id of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Id of the user.
    pub uid: u32,
    /// Id of the primary group.
    pub gid: u32,
}

/// Returns the account of that name on this machine, if there is one.
///
/// # Errors
///
/// If `/etc/passwd` exists and cannot be read.
pub fn find(name: &str) -> io::Result<Option<Account>> {
    find_in(Path::new(PASSWD), name)
}

/// Returns the account of that name from a file with the format of `/etc/passwd`. A missing file
/// has no accounts.
///
/// # Errors
///
/// If the file exists and cannot be read.
pub fn find_in(passwd: &Path, name: &str) -> io::Result<Option<Account>> {
    Ok(read(passwd)?.lines().find_map(|line| parse(line, name)))
}

/// Returns the name of the first account with that user id from a file with the format of
/// `/etc/passwd`.
///
/// # Errors
///
/// If the file exists and cannot be read.
pub fn name_in(passwd: &Path, uid: u32) -> io::Result<Option<String>> {
    let text = read(passwd)?;
    let mut names = text.lines().filter_map(|line| {
        let name = line.split(':').next()?;
        parse(line, name).filter(|account| account.uid == uid).map(|_| name)
    });
    Ok(names.next().map(str::to_owned))
}

/// Returns the text of the file; empty if it does not exist.
fn read(passwd: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let file = match std::fs::File::open(passwd) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(PASSWD_BYTES).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Parses a line, `name:password:uid:gid:...`, and returns the account if it has that name.
pub fn parse(line: &str, name: &str) -> Option<Account> {
    let mut fields = line.split(':');
    if fields.next()? != name {
        return None;
    }
    let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Account { uid, gid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_found_by_its_whole_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "root:x:0:0:root:/root:/bin/sh\n# towline:x:1:1::\ntowline-controller:x:990:991::/:/x\n\
                    towline:x:oops:1::/:/x\ntowline:x:997:998::/:/usr/sbin/nologin\n";
        std::fs::write(file.path(), text).unwrap();
        let find = |name| find_in(file.path(), name).unwrap();
        assert_eq!(find("towline"), Some(Account { uid: 997, gid: 998 }));
        assert_eq!(find("towline-controller"), Some(Account { uid: 990, gid: 991 }));
        assert_eq!(find("tow"), None);
        assert_eq!(find_in(Path::new("/nowhere/passwd"), "towline").unwrap(), None);
    }
}
