//! Handling of one connection: identifies the client, opens the requested files and responds.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, recv, sendmsg, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::protocol::{
    CNI_DIRECTORIES, DESCRIPTORS, REQUEST_BYTES, Request, Response, Status, TunnelLink,
};
use crate::{egress, programs, wireguard_socket};

/// Name of the agent's user.
const AGENT: &str = "towline";
const PASSWD: &str = "/etc/passwd";
/// Largest number of bytes that are read of `/etc/passwd`.
const PASSWD_BYTES: u64 = 8 * 1024 * 1024;
/// Longest time to wait for the request, and for room to send the response, in seconds each.
const TIMEOUT_SECONDS: i64 = 5;
/// Largest size of a file that is opened for a client, in bytes. Every kubeconfig, certificate and
/// configuration of a container network is smaller.
const FILE_BYTES: u64 = 1 << 20;
/// Largest number of directory entries that are examined.
const NAMES: usize = 256;
/// Directory with an entry for each link of the network namespace.
const LINKS: &str = "/sys/class/net";
/// Largest number of links that are examined: more than a host with thousands of pods has.
const MOST_LINKS: usize = 65_536;

/// File system that the helper works on.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Directory that all paths are relative to. `/` except in tests.
    pub root: PathBuf,
}

impl Default for Machine {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

/// Answers the only request of a connection, and returns its result.
///
/// # Errors
///
/// Returns an error if the client cannot be identified, sends no request in time, or does not
/// receive the response.
pub fn serve(connection: BorrowedFd<'_>, machine: &Machine) -> io::Result<Status> {
    let timeout = TimeVal::new(TIMEOUT_SECONDS, 0);
    setsockopt(&connection, sockopt::ReceiveTimeout, &timeout)?;
    setsockopt(&connection, sockopt::SendTimeout, &timeout)?;
    let peer = getsockopt(&connection, sockopt::PeerCredentials)?;
    let allowed = peer.uid() == 0 || agents_uid(machine)? == Some(peer.uid());
    let (response, descriptors) = if allowed {
        // The buffer is one byte longer than a request, so that a longer message is detected.
        let mut message = [0; REQUEST_BYTES + 1];
        let length = recv(connection.as_raw_fd(), &mut message, MsgFlags::empty())?;
        match message.get(..length).and_then(Request::parse) {
            Some(request) => answer(machine.perform(request, peer.uid())),
            None => (Response::without(Status::Malformed, 0), Vec::new()),
        }
    } else {
        (Response::without(Status::Denied, 0), Vec::new())
    };
    send(connection, response, &descriptors)?;
    Ok(response.status)
}

fn answer(performed: io::Result<Vec<Option<OwnedFd>>>) -> (Response, Vec<OwnedFd>) {
    let opened = match performed {
        Ok(opened) => opened,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            return (Response::without(Status::Failed, errno), Vec::new());
        }
    };
    let bits = opened.iter().take(DESCRIPTORS).enumerate();
    let present = bits.fold(0, |bits, (at, file)| bits | u8::from(file.is_some()) << at);
    let descriptors = opened.into_iter().take(DESCRIPTORS).flatten().collect();
    (Response { status: Status::Done, present, errno: 0 }, descriptors)
}

fn send(connection: BorrowedFd<'_>, response: Response, descriptors: &[OwnedFd]) -> io::Result<()> {
    let message = response.encode();
    let numbers: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &rights[..0] } else { &rights[..] };
    let parts = [IoSlice::new(&message)];
    sendmsg::<()>(connection.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

impl Machine {
    /// Carries out a request and returns its descriptors, in the order of its files. An absent file
    /// is `None`. `client` is the uid of the client.
    fn perform(&self, request: Request, client: u32) -> io::Result<Vec<Option<OwnedFd>>> {
        match request {
            Request::Kubelet(installation) => {
                let files = installation.files().iter();
                files.map(|file| self.open(Path::new(file))).collect()
            }
            Request::ContainerNetwork => self.container_network(),
            Request::TunDevice => {
                let mut how = OpenOptions::new();
                let how = how.read(true).write(true).custom_flags(libc::O_NONBLOCK);
                Ok(vec![Some(how.open(self.place(Path::new("/dev/net/tun")))?.into())])
            }
            Request::SteeringProgram => Ok(vec![Some(programs::steering()?)]),
            Request::GuardUplink(guard) => egress::attach(&guard).map(|()| Vec::new()),
            Request::OpenUplink(uplink) => egress::detach(uplink).map(|()| Vec::new()),
            Request::WireguardSocket(link) => {
                let name = self.name_of_tunnel(link, client)?;
                let directory = self.place(Path::new(wireguard_socket::DIRECTORY));
                Ok(vec![Some(wireguard_socket::open(&directory, &name)?)])
            }
            Request::RemoveWireguardSocket(link) => {
                let name = self.name_of_tunnel(link, client)?;
                let directory = self.place(Path::new(wireguard_socket::DIRECTORY));
                wireguard_socket::remove(&directory, &name).map(|()| Vec::new())
            }
        }
    }

    /// Returns the name of a TUN link that belongs to the client. Root may name any TUN. The name comes
    /// from the kernel, so the client cannot choose which socket is opened.
    fn name_of_tunnel(&self, link: TunnelLink, client: u32) -> io::Result<String> {
        if !link.is_here()? {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let number = |path: PathBuf| -> Option<u32> {
            std::fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        let links = self.place(Path::new(LINKS));
        for entry in std::fs::read_dir(links)?.take(MOST_LINKS) {
            let entry = entry?;
            if number(entry.path().join("ifindex")) != Some(link.index()) {
                continue;
            }
            // Links of other kinds have no such file. A TUN without an owner has the number -1.
            let owner = number(entry.path().join("owner"));
            let is_tun = entry.path().join("tun_flags").exists();
            if !is_tun || (client != 0 && owner != Some(client)) {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            let name = entry.file_name().into_string();
            return name.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
        }
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Opens the first files of the first directory that has any, in the order in which container
    /// runtimes read them.
    fn container_network(&self) -> io::Result<Vec<Option<OwnedFd>>> {
        for directory in CNI_DIRECTORIES {
            let Ok(entries) = std::fs::read_dir(self.place(Path::new(directory))) else { continue };
            let mut names: Vec<PathBuf> = entries
                .take(NAMES)
                .filter_map(|entry| Some(Path::new(directory).join(entry.ok()?.file_name())))
                .filter(|path| {
                    let extension = path.extension().and_then(|extension| extension.to_str());
                    matches!(extension, Some("conf" | "conflist" | "json"))
                })
                .collect();
            names.sort();
            let files = names.iter().filter_map(|path| self.open(path).transpose());
            let files: Vec<_> =
                files.take(DESCRIPTORS).map(|file| file.map(Some)).collect::<Result<_, _>>()?;
            if !files.is_empty() {
                return Ok(files);
            }
        }
        Ok(Vec::new())
    }

    /// Opens a regular file for reading. Returns `None` if it is absent. Symbolic links are
    /// followed, because the kubelet rotates its certificate with one, in a directory that only
    /// root may write.
    fn open(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let opened =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.place(path));
        let file: File = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > FILE_BYTES {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        Ok(Some(file.into()))
    }

    fn place(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

/// Returns the uid of the agent's user, if this machine has that user.
fn agents_uid(machine: &Machine) -> io::Result<Option<u32>> {
    let file = match File::open(machine.place(Path::new(PASSWD))) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(PASSWD_BYTES).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let uid = |line: &str| {
        let mut fields = line.split(':');
        (fields.next()? == AGENT).then_some(())?;
        fields.nth(1)?.parse().ok()
    };
    Ok(text.lines().find_map(uid))
}

/// Accepts and serves connections one after another until the process ends, for machines without
/// socket activation.
///
/// # Errors
///
/// Returns the system's error if no connection can be accepted.
#[expect(clippy::print_stderr, reason = "the service manager keeps it in the journal")]
pub fn serve_all(listener: &OwnedFd, machine: &Machine) -> io::Result<()> {
    use nix::sys::socket::{SockFlag, accept4};
    use std::os::fd::FromRawFd as _;
    loop {
        let connection = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the descriptor is new, and nothing else owns it.
        let connection = unsafe { OwnedFd::from_raw_fd(connection) };
        if let Err(error) = serve(connection.as_fd(), machine) {
            eprintln!("towline-helper: cannot answer a request: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::symlink;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::geteuid;

    use super::*;
    use crate::client;
    use crate::protocol::Installation;

    /// Returns a machine whose only user has the name `name` and the uid of the test.
    fn machine(name: &str) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        let machine = Machine { root: root.path().to_owned() };
        put(&machine, "/etc/passwd", &format!("{name}:x:{}:0::/:/x\n", geteuid()));
        (root, machine)
    }

    fn put(machine: &Machine, path: &str, text: &str) {
        let place = machine.place(Path::new(path));
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(place, text).unwrap();
    }

    /// Sends a message to a server and returns its response.
    fn exchange(machine: &Machine, message: &[u8]) -> io::Result<(Response, Vec<OwnedFd>)> {
        let kind = SockType::SeqPacket;
        let (client, server) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        nix::sys::socket::send(client.as_raw_fd(), message, MsgFlags::empty()).unwrap();
        serve(server.as_fd(), machine)?;
        client::receive(client.as_fd())
    }

    fn text(descriptor: OwnedFd) -> String {
        let mut text = String::new();
        File::from(descriptor).read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_current_certificate_is_opened_at_each_request() {
        let (_root, machine) = machine("towline");
        put(&machine, "/etc/kubernetes/kubelet.conf", "kubeconfig");
        let request = Request::Kubelet(Installation::Kubeadm).encode();
        let link = machine.place(Path::new("/var/lib/kubelet/pki/kubelet-client-current.pem"));
        for name in ["first", "second"] {
            put(&machine, &format!("/var/lib/kubelet/pki/{name}.pem"), name);
            let _ = std::fs::remove_file(&link);
            symlink(format!("{name}.pem"), &link).unwrap();
            let (response, files) = exchange(&machine, &request).unwrap();
            assert_eq!(response, Response { status: Status::Done, present: 0b011, errno: 0 });
            let files: Vec<String> = files.into_iter().map(text).collect();
            assert_eq!(files, ["kubeconfig", name]);
        }
    }

    #[test]
    fn a_descriptor_only_reads() {
        let (_root, machine) = machine("towline");
        put(&machine, "/etc/kubernetes/kubelet.conf", "kubeconfig");
        let request = Request::Kubelet(Installation::Kubeadm).encode();
        let (_, mut files) = exchange(&machine, &request).unwrap();
        use std::io::Write as _;
        File::from(files.remove(0)).write_all(b"x").unwrap_err();
    }

    #[test]
    fn what_is_no_request_is_answered_and_nothing_is_opened() {
        let (_root, machine) = machine("towline");
        put(&machine, "/etc/kubernetes/kubelet.conf", "kubeconfig");
        let request = Request::Kubelet(Installation::Kubeadm).encode();
        let long = [&request[..], b"/etc/shadow"].concat();
        for message in [&b"/etc/shadow"[..], b"TH\x01\x00", &request[..3], &long] {
            let (response, files) = exchange(&machine, message).unwrap();
            assert_eq!((response.status, files.len()), (Status::Malformed, 0), "{message:?}");
        }
    }

    /// Returns a connection whose client has this uid. `None` if the test may not change its uid.
    fn pair_of(uid: u32) -> Option<(OwnedFd, OwnedFd)> {
        let make = move || {
            // SAFETY: the system call changes only the calling thread, which ends with this
            // closure.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
            let kind = SockType::SeqPacket;
            let pair = || socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
            (changed == 0).then(|| pair().unwrap())
        };
        std::thread::spawn(make).join().unwrap()
    }

    #[test]
    fn only_root_and_the_agents_user_are_served() {
        let (_root, machine) = machine("root");
        let users =
            "root:x:0:0::/:/x\ntowline:x:64123:64124::/:/x\ntowline-controller:x:64125:1::/:/x\n";
        put(&machine, "/etc/passwd", users);
        put(&machine, "/etc/kubernetes/kubelet.conf", "kubeconfig");
        for (uid, status) in [
            (0, Status::Done),
            (64_123, Status::Done),
            (64_125, Status::Denied),
            (64_124, Status::Denied),
            (65_534, Status::Denied),
        ] {
            let Some((client, server)) = pair_of(uid) else {
                return println!("skipped: only root can ask as another user");
            };
            let request = Request::Kubelet(Installation::Kubeadm).encode();
            nix::sys::socket::send(client.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
            assert_eq!(serve(server.as_fd(), &machine).unwrap(), status, "uid {uid}");
            let (response, files) = client::receive(client.as_fd()).unwrap();
            assert_eq!(
                (response.status, files.len()),
                (status, usize::from(status == Status::Done))
            );
        }
    }

    #[test]
    fn on_a_machine_without_the_agents_user_only_root_is_served() {
        let (root, machine) = machine("towline");
        std::fs::remove_file(root.path().join("etc/passwd")).unwrap();
        let Some((client, server)) = pair_of(64_123) else {
            return println!("skipped: only root can ask as another user");
        };
        let request = Request::TunDevice.encode();
        nix::sys::socket::send(client.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
        assert_eq!(serve(server.as_fd(), &machine).unwrap(), Status::Denied);
    }

    #[test]
    fn absent_files_are_left_out_and_others_than_files_are_refused() {
        let (_root, machine) = machine("towline");
        let request = Request::Kubelet(Installation::K3s).encode();
        let (response, files) = exchange(&machine, &request).unwrap();
        assert_eq!((response.present, files.len()), (0, 0));
        let place = machine.place(Path::new("/var/lib/rancher/k3s/agent/kubelet.kubeconfig"));
        std::fs::create_dir_all(&place).unwrap();
        let (response, _) = exchange(&machine, &request).unwrap();
        assert_eq!(response.status, Status::Failed);
        std::fs::remove_dir(&place).unwrap();
        nix::unistd::mkfifo(&place, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (response, _) = exchange(&machine, &request).unwrap();
        assert_eq!(response.status, Status::Failed, "opening a pipe does not block");
    }

    #[test]
    fn the_container_network_is_that_of_the_first_directory_with_files() {
        let (_root, machine) = machine("towline");
        put(&machine, "/etc/cni/net.d/README", "no configuration");
        put(&machine, "/var/lib/rancher/k3s/agent/etc/cni/net.d/10-flannel.conflist", "flannel");
        let request = Request::ContainerNetwork.encode();
        let (_, files) = exchange(&machine, &request).unwrap();
        assert_eq!(files.into_iter().map(text).collect::<Vec<_>>(), ["flannel"]);
        put(&machine, "/etc/cni/net.d/20-b.conf", "b");
        put(&machine, "/etc/cni/net.d/10-a.conflist", "a");
        let (response, files) = exchange(&machine, &request).unwrap();
        assert_eq!(response.present, 0b11);
        assert_eq!(files.into_iter().map(text).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn the_socket_of_wg_is_opened_for_the_owner_of_the_tun_alone() {
        let (_root, machine) = machine("towline");
        let client = geteuid().as_raw();
        for (name, index, owner) in [("tl0", 7, client), ("tl1", 8, 64_123)] {
            put(&machine, &format!("/sys/class/net/{name}/ifindex"), &format!("{index}\n"));
            put(&machine, &format!("/sys/class/net/{name}/owner"), &format!("{owner}\n"));
            put(&machine, &format!("/sys/class/net/{name}/tun_flags"), "0x1001\n");
        }
        put(&machine, "/sys/class/net/eth0/ifindex", "9\n");
        std::fs::create_dir_all(machine.place(Path::new("/run"))).unwrap();
        let link = |index| TunnelLink::here(index).unwrap().unwrap();
        let ask = |request: Request| exchange(&machine, &request.encode()).unwrap();
        let (response, mut files) = ask(Request::WireguardSocket(link(7)));
        assert_eq!(response, Response { status: Status::Done, present: 1, errno: 0 });
        let path = machine.place(Path::new("/run/wireguard/tl0.sock"));
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        // A socket that is served stays, and is not opened a second time.
        let (response, _) = ask(Request::RemoveWireguardSocket(link(7)));
        assert_eq!((response.status, response.errno), (Status::Failed, libc::EADDRINUSE));
        let (response, _) = ask(Request::WireguardSocket(link(7)));
        assert_eq!((response.status, response.errno), (Status::Failed, libc::EADDRINUSE));
        files.clear();
        let (response, _) = ask(Request::RemoveWireguardSocket(link(7)));
        assert_eq!((response.status, path.exists()), (Status::Done, false));
        // Other kinds of links, links that do not exist, and those of other users.
        for index in [9, 10] {
            let (response, _) = ask(Request::WireguardSocket(link(index)));
            assert_eq!(response.status, Status::Failed, "{index}");
        }
        assert!(machine.name_of_tunnel(link(8), 64_124).is_err());
        assert_eq!(machine.name_of_tunnel(link(8), 64_123).unwrap(), "tl1");
    }

    #[test]
    fn a_client_that_hangs_up_is_an_error_and_not_waited_for() {
        let (_root, machine) = machine("towline");
        let kind = SockType::SeqPacket;
        let (client, server) =
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        drop(client);
        // A closed connection reads as an empty message, which is not a request. The response
        // cannot be sent.
        serve(server.as_fd(), &machine).unwrap_err();
    }
}
