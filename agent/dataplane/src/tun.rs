//! The host side of the data plane: exchanges batches of packets with the host through a TUN link.

use std::ffi::{CStr, c_int, c_short, c_uint, c_ulong};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use towline_helper::client;
use towline_helper::protocol::Request;

use super::Offloads;
use super::arena::{Frame, HEADROOM, TunBatch, WriteBatch};
use super::coalesce::{Coalesce, TCP_PACKETS, TunnelPorts};
use super::drops::{DropReason, Drops};
use super::steering;
use super::switch::{OffReason, Switch};
use super::vnet::{
    GSO_NONE, GSO_TUNNEL_V4, GSO_TUNNEL_V6, GSO_UDP_L4, VNET_HEADER_BYTES,
    VNET_TUNNEL_HEADER_BYTES, VnetHeader,
};

/// I/O with the host in batches of packets. Implemented by [`Tun`], [`NoTun`], and
/// [`MemoryTun`](super::memory::MemoryTun).
pub trait TunIo: Send + 'static {
    /// Returns the descriptor that is readable when there is a packet.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Returns the current MTU of the link in bytes.
    fn mtu(&self) -> usize;

    /// Fills the batch with packets that the host has sent, without waiting. A packet that cannot
    /// be read is counted.
    ///
    /// # Errors
    ///
    /// Returns the system's error if the link is gone.
    fn read(&mut self, batch: &mut TunBatch, drops: &Drops) -> io::Result<()>;

    /// Returns which packets may be coalesced in the batches passed to [`TunIo::write`].
    fn coalesce(&self) -> Coalesce;

    /// Writes the whole batch in order. Packets that the host refuses are counted.
    fn write(&mut self, now: Instant, batch: &WriteBatch, drops: &Drops);

    /// Returns the switches of the offloads, as clones that show their state at any time.
    fn features(&self) -> Vec<Switch>;
}

/// Replacement for a TUN link on a node without one, such as a relay. No packet comes from it, and
/// every packet written to it is dropped.
#[derive(Debug)]
pub struct NoTun(EventFd);

impl NoTun {
    /// Creates the replacement.
    ///
    /// # Errors
    ///
    /// Returns the system's error if it provides no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }
}

impl TunIo for NoTun {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn mtu(&self) -> usize {
        usize::from(u16::MAX)
    }

    fn read(&mut self, _batch: &mut TunBatch, _drops: &Drops) -> io::Result<()> {
        Ok(())
    }

    fn coalesce(&self) -> Coalesce {
        Coalesce::default()
    }

    fn write(&mut self, _now: Instant, batch: &WriteBatch, drops: &Drops) {
        let packets: usize = batch.frames().iter().map(|frame| frame.pieces).sum();
        drops.add(DropReason::TunRefused, packets as u64);
    }

    fn features(&self) -> Vec<Switch> {
        Vec::new()
    }
}

/// Flags of `TUNSETOFFLOAD` for TCP: the packets that the TUN may deliver unsplit or without a
/// checksum.
const OFFLOAD_TCP: c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Flags of `TUNSETOFFLOAD` for UDP.
const OFFLOAD_UDP: c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
/// Flags of `TUNSETOFFLOAD` for UDP tunnels: `TUN_F_UDP_TUNNEL_GSO` and `TUN_F_UDP_TUNNEL_GSO_CSUM`
/// of `linux/if_tun.h`.
const OFFLOAD_TUNNEL: c_uint = 0x80 | 0x100;

const ETHERNET_HEADER_BYTES: u16 = 14;
/// Largest number of parts of one write: the virtio header, and one for each packet of a super-packet.
const VECTORS: usize = 1 + TCP_PACKETS;

/// Error of opening a TUN link.
#[derive(Debug, thiserror::Error)]
pub enum OpenTunError {
    /// The kernel has no TUN driver, or the container has no access to the device.
    #[error(
        "cannot open a TUN link: /dev/net/tun is missing: load the kernel module `tun`, or give the container that device"
    )]
    NoDevice,
    /// The process lacks the privilege.
    #[error(
        "cannot open the TUN link `{0}`: permission denied: run as root or grant CAP_NET_ADMIN, and let the agent's user open /dev/net/tun"
    )]
    NotPermitted(String),
    /// Another process has the link open.
    #[error(
        "cannot open the TUN link `{0}`: in use by another process: stop it, or configure another name"
    )]
    Busy(String),
    /// The name is empty, too long, or has a character that a link's name may not have.
    #[error(
        "cannot open the TUN link `{0}`: invalid name: use 1 to 15 characters without `/`, `%` or space"
    )]
    BadName(String),
    /// A link of another kind has the name.
    #[error(
        "cannot open the TUN link `{0}`: a link of another kind has that name: remove it, or configure another name"
    )]
    NameTaken(String),
    /// Another error of the system.
    #[error("cannot open the TUN link `{name}`: {step}: {error}")]
    Other {
        /// Name of the link.
        name: String,
        /// Name of the device, system call or ioctl that failed.
        step: &'static str,
        /// Error of the system.
        error: io::Error,
    },
}

/// TUN link whose packets have a virtio header. It is persistent: it remains after the process
/// ends, with its addresses and routes.
#[derive(Debug)]
pub struct Tun {
    file: File,
    /// Socket for ioctls that the TUN device does not support, such as reading the MTU.
    control: OwnedFd,
    name: String,
    /// Length of the virtio header before each packet, in bytes.
    header_len: usize,
    /// Switch of TCP super-packets.
    tcp: Switch,
    /// Switch of UDP super-packets.
    udp: Switch,
    /// Switch of super-packets inside a UDP tunnel of the host.
    tunnel: Switch,
    /// State of multiple queues. Set in the first queue if several were requested.
    queues: Option<Switch>,
    /// Ports of the host's UDP tunnels.
    host_tunnels: HostTunnels,
    /// Parts of one write, kept for their capacity. Empty between writes.
    vectors: Vec<libc::iovec>,
}

// SAFETY: the raw pointers in `vectors` are only used within a call that has just written them,
// under `&mut self`.
unsafe impl Send for Tun {}

/// Opens the TUN link `name`, and creates it if it does not exist. Does not set it up or configure
/// addresses. Uses every offload that the kernel has.
///
/// # Errors
///
/// Returns [`OpenTunError`], one line for the operator.
pub fn open_tun(name: &str) -> Result<Tun, OpenTunError> {
    open_tun_with(name, Offloads::default())
}

/// Opens the TUN link like [`open_tun`], with only these offloads.
///
/// # Errors
///
/// Returns [`OpenTunError`], one line for the operator.
pub fn open_tun_with(name: &str, offloads: Offloads) -> Result<Tun, OpenTunError> {
    // A persistent link keeps the kind it was created with (one queue or several) until it is
    // removed.
    let (file, name) = match attach(name, false) {
        Err(OpenTunError::NameTaken(_)) => attach(name, true)?,
        attached => attached?,
    };
    configure(file, name, offloads)
}

/// Opens `count` queues of the TUN link `name`, one for each worker, and creates the link if it
/// does not exist. All packets for one address arrive by the same queue. If the kernel cannot do
/// that, opens one queue only, and [`TunIo::features`] has the reason.
///
/// # Errors
///
/// Returns [`OpenTunError`], one line for the operator.
pub fn open_tun_queues(
    name: &str,
    offloads: Offloads,
    count: usize,
) -> Result<Vec<Tun>, OpenTunError> {
    if count < 2 {
        return Ok(vec![open_tun_with(name, offloads)?]);
    }
    let (mut first, more) = match attach(name, true) {
        Ok((file, name)) => {
            let first = configure(file, name, offloads)?;
            let more = more_queues(&first, count - 1).map_err(|error| error.to_string());
            (first, more)
        }
        Err(OpenTunError::NameTaken(_)) => {
            let why = "the link was made with one: remove it (`towline down`) and start again";
            (open_tun_with(name, offloads)?, Err(why.to_owned()))
        }
        Err(error) => return Err(error),
    };
    let (queues, probed) = match more {
        Ok(queues) => (queues, Ok(())),
        Err(why) => (Vec::new(), Err(why)),
    };
    first.queues = Some(Switch::new("tun_queues", probed.map_err(OffReason::Unsupported)));
    Ok(std::iter::once(first).chain(queues).collect())
}

/// Opens `count` queues in addition to the first. They share its switches.
fn more_queues(first: &Tun, count: usize) -> io::Result<Vec<Tun>> {
    steering::by_destination(first.fd())?;
    let more = (0..count).map(|_| {
        let (file, _) = attach(&first.name, true).map_err(io::Error::other)?;
        Ok(Tun {
            file,
            control: first.control.try_clone()?,
            name: first.name.clone(),
            header_len: first.header_len,
            tcp: first.tcp.clone(),
            udp: first.udp.clone(),
            tunnel: first.tunnel.clone(),
            queues: None,
            host_tunnels: first.host_tunnels.clone(),
            vectors: Vec::with_capacity(VECTORS),
        })
    });
    more.collect()
}

/// Opens the device, through the helper if only root may open it.
fn open_device() -> io::Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun");
    match opened {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            // The original error helps the operator more than the helper's.
            client::ask_for_one(Request::TunDevice).map(File::from).map_err(|_| error)
        }
        opened => opened,
    }
}

/// Sets the owner of the TUN link `name` to the user id `owner`. A link that does not exist is
/// created and disappears again.
///
/// # Errors
///
/// Returns [`OpenTunError`], one line for the operator. [`OpenTunError::Busy`] if the link has one
/// queue and another process holds it.
pub fn own_tun(name: &str, owner: u32) -> Result<(), OpenTunError> {
    match attach_as(name, false, owner) {
        Err(OpenTunError::NameTaken(_)) => attach_as(name, true, owner).map(drop),
        attached => attached.map(drop),
    }
}

/// Attaches to a queue of the link and makes the process's effective user its owner. Creates the
/// link if it does not exist. Returns the queue and the link's name.
fn attach(name: &str, of_several: bool) -> Result<(File, String), OpenTunError> {
    attach_as(name, of_several, nix::unistd::geteuid().as_raw())
}

/// Attaches to a queue like [`attach`], with the owner `owner`. Any local user could attach to a
/// link without an owner, read what enters the tunnel and inject packets that seem to leave it,
/// even while no agent runs.
fn attach_as(name: &str, of_several: bool, owner: u32) -> Result<(File, String), OpenTunError> {
    let other = |step| {
        let name = name.to_owned();
        move |error| OpenTunError::Other { name, step, error }
    };
    let mut request = interface_request(name)?;
    let file = open_device().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenTunError::NoDevice,
        Some(libc::EPERM | libc::EACCES) => OpenTunError::NotPermitted(name.to_owned()),
        _ => other("/dev/net/tun")(error),
    })?;
    let several = if of_several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
    unsafe { ioctl(file.as_fd(), libc::TUNSETIFF, (&raw mut request).cast()) }.map_err(
        |error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => OpenTunError::NotPermitted(name.to_owned()),
            Some(libc::EBUSY) => OpenTunError::Busy(name.to_owned()),
            Some(libc::EINVAL | libc::EEXIST) => OpenTunError::NameTaken(name.to_owned()),
            _ => other("TUNSETIFF")(error),
        },
    )?;
    let name = interface_name(&request).unwrap_or_else(|| name.to_owned());
    // An existing link may have no owner, or the owner of an earlier installation.
    // SAFETY: the argument of this ioctl is a number and not an address.
    unsafe { ioctl(file.as_fd(), libc::TUNSETOWNER, owner as usize as *mut _) }
        .map_err(|error| OpenTunError::Other { name: name.clone(), step: "TUNSETOWNER", error })?;
    Ok((file, name))
}

/// Sets the options that apply to the whole link.
fn configure(file: File, name: String, offloads: Offloads) -> Result<Tun, OpenTunError> {
    let other = |step| {
        let name = name.clone();
        move |error| OpenTunError::Other { name, step, error }
    };
    let set = |code: c_ulong, step, value: usize| {
        // SAFETY: these requests take their argument by value.
        unsafe { ioctl(file.as_fd(), code, value as *mut _) }.map_err(other(step))
    };
    set(libc::TUNSETPERSIST as _, "TUNSETPERSIST", 1)?;
    // A persistent link keeps the options of its last user, so all of them are set again.
    let put = |code: c_ulong, step, mut value: c_int| {
        // SAFETY: these requests read one `int`, which `value` is.
        unsafe { ioctl(file.as_fd(), code, (&raw mut value).cast()) }.map_err(other(step))
    };
    put(libc::TUNSETVNETLE as _, "TUNSETVNETLE", 1)?;
    let set_offload =
        |flags: c_uint| set(libc::TUNSETOFFLOAD as _, "TUNSETOFFLOAD", flags as usize);
    let header_len =
        |bytes: usize| put(libc::TUNSETVNETHDRSZ as _, "TUNSETVNETHDRSZ", bytes as c_int);
    set_offload(0)?;
    header_len(VNET_HEADER_BYTES)?;
    let try_offload = |wanted: bool, flags: c_uint, since: &str| match wanted {
        true => set_offload(flags)
            .map_err(|error| OffReason::Unsupported(format!("it needs {since}: {error}"))),
        false => Err(OffReason::Configured),
    };
    let tcp = try_offload(offloads.tun_tcp, OFFLOAD_TCP, "a TUN with TSO");
    let udp = tcp
        .clone()
        .and_then(|()| try_offload(offloads.tun_udp, OFFLOAD_TCP | OFFLOAD_UDP, "Linux 6.2"));
    let all = OFFLOAD_TCP | OFFLOAD_UDP | OFFLOAD_TUNNEL;
    let mut bytes = VNET_HEADER_BYTES;
    let tunnel = udp.clone().and_then(|()| {
        // The kernel requires the longer header to be set first.
        let room = header_len(VNET_TUNNEL_HEADER_BYTES)
            .map_err(|error| OffReason::Unsupported(error.to_string()));
        room.and_then(|()| try_offload(offloads.tun_tunnel, all, "Linux 6.17"))
    });
    if tunnel.is_ok() {
        bytes = VNET_TUNNEL_HEADER_BYTES;
    }
    header_len(bytes)?;
    let control = control_socket().map_err(other("socket"))?;
    Ok(Tun {
        file,
        control,
        name,
        header_len: bytes,
        tcp: Switch::new("tun_tcp", tcp),
        udp: Switch::new("tun_udp", udp),
        tunnel: Switch::new("tun_tunnel", tunnel),
        queues: None,
        host_tunnels: HostTunnels::default(),
        vectors: Vec::with_capacity(VECTORS),
    })
}

/// UDP ports on which the host itself decapsulates VXLAN or Geneve. Segments inside are coalesced
/// only for those ports: any other receiver would get one large datagram.
///
/// Clones share their state.
#[derive(Debug, Clone, Default)]
pub struct HostTunnels(Arc<AtomicU64>);

impl HostTunnels {
    /// Replaces the ports. Only the first four are used; segments to further ports are not
    /// coalesced.
    pub fn set(&self, ports: impl IntoIterator<Item = u16>) {
        let packed =
            ports.into_iter().take(4).fold(0, |packed, port| packed << 16 | u64::from(port));
        self.0.store(packed, Ordering::Relaxed);
    }

    fn ports(&self) -> TunnelPorts {
        let packed = self.0.load(Ordering::Relaxed);
        [0, 16, 32, 48].map(|shift| (packed >> shift) as u16)
    }
}

impl Tun {
    /// Returns the name of the link.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replaces the set of the host's tunnels. Later changes of the set take effect too.
    #[must_use]
    pub fn with_host_tunnels(self, host_tunnels: HostTunnels) -> Self {
        Self { host_tunnels, ..self }
    }

    fn write_frame(&mut self, batch: &WriteBatch, frame: &Frame) -> io::Result<()> {
        let mut header = frame.header;
        if header.gso_type & (GSO_TUNNEL_V4 | GSO_TUNNEL_V6) != 0 {
            // The kernel's check of this offset counts an Ethernet header, which a TUN does not
            // have. The kernel then computes the offset itself from the IP header.
            header.outer_transport += ETHERNET_HEADER_BYTES;
        }
        let header = header.encode_tunnel();
        let vector = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        self.vectors.clear();
        self.vectors.push(vector(&header[..self.header_len]));
        self.vectors.extend(batch.pieces(frame).map(vector));
        // SAFETY: the vectors point, to be read only, to the header on the stack and to parts of
        // the batch, all of which live until the call returns.
        let written = unsafe {
            let count = self.vectors.len() as c_int;
            libc::writev(self.file.as_raw_fd(), self.vectors.as_ptr(), count)
        };
        self.vectors.clear();
        if written == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl TunIo for Tun {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn mtu(&self) -> usize {
        // The link may have been renamed since, so the name is read first.
        let mut request = zeroed_request();
        // SAFETY: TUNGETIFF writes one `ifreq`, SIOCGIFMTU reads and writes one.
        let asked = unsafe {
            ioctl(self.fd(), libc::TUNGETIFF, (&raw mut request).cast()).and_then(|()| {
                ioctl(self.control.as_fd(), libc::SIOCGIFMTU, (&raw mut request).cast())
            })
        };
        match asked {
            // SAFETY: SIOCGIFMTU has just written this member; every bit pattern is an `int`.
            Ok(()) => unsafe { request.ifr_ifru.ifru_mtu as usize },
            Err(_) => usize::MAX,
        }
    }

    fn read(&mut self, batch: &mut TunBatch, drops: &Drops) -> io::Result<()> {
        while let Some(spare) = batch.spare() {
            let start = HEADROOM - self.header_len;
            match self.file.read(&mut spare[start..]) {
                Ok(len) if len >= self.header_len => {
                    let header = VnetHeader::decode(&spare[start..HEADROOM]);
                    batch.commit(header, len - self.header_len);
                }
                Ok(_) => {
                    drops.count(DropReason::TunUnreadable);
                    break;
                }
                Err(error) => match error.raw_os_error() {
                    // No packet is left, or the link is about to disappear.
                    Some(libc::EAGAIN | libc::EINTR | libc::EIO) => break,
                    Some(libc::EBADFD | libc::ENODEV | libc::EFAULT) => return Err(error),
                    // One packet could not be delivered. The kernel has dropped it.
                    _ => {
                        drops.count(DropReason::TunUnreadable);
                        break;
                    }
                },
            }
        }
        Ok(())
    }

    fn coalesce(&self) -> Coalesce {
        let ports = self.host_tunnels.ports();
        let (tunnels, whole) = if self.tunnel.is_on() { (ports, [0; 4]) } else { ([0; 4], ports) };
        Coalesce { tcp: self.tcp.is_on(), udp: self.udp.is_on(), tunnels, whole }
    }

    fn write(&mut self, now: Instant, batch: &WriteBatch, drops: &Drops) {
        for frame in batch.frames() {
            let Err(error) = self.write_frame(batch, frame) else { continue };
            drops.add(DropReason::TunRefused, frame.pieces as u64);
            if error.raw_os_error() == Some(libc::EINVAL) {
                match frame.header.gso_type {
                    GSO_NONE => {}
                    GSO_UDP_L4 => self.udp.disable_after_error(&error, now),
                    inside if inside & (GSO_TUNNEL_V4 | GSO_TUNNEL_V6) != 0 => {
                        self.tunnel.disable_after_error(&error, now);
                    }
                    _ => self.tcp.disable_after_error(&error, now),
                }
            }
        }
        self.tcp.retry(now);
        self.udp.retry(now);
        self.tunnel.retry(now);
    }

    fn features(&self) -> Vec<Switch> {
        let all = [&self.tcp, &self.udp, &self.tunnel].into_iter().chain(&self.queues);
        all.cloned().collect()
    }
}

/// Runs an ioctl.
///
/// # Safety
///
/// `argument` must be valid for the request `code`.
unsafe fn ioctl(
    fd: BorrowedFd<'_>,
    code: impl Into<c_ulong>,
    argument: *mut libc::c_void,
) -> io::Result<()> {
    // SAFETY: the descriptor is open; the caller guarantees that the argument is valid.
    match unsafe { libc::ioctl(fd.as_raw_fd(), code.into() as _, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn zeroed_request() -> libc::ifreq {
    // SAFETY: `ifreq` is plain data, and all zeros is a valid value.
    unsafe { std::mem::zeroed() }
}

fn interface_request(name: &str) -> Result<libc::ifreq, OpenTunError> {
    let bad = name.is_empty()
        || name == "."
        || name == ".."
        || name.len() >= libc::IFNAMSIZ
        || name.bytes().any(|byte| byte == b'/' || byte == b'%' || byte <= b' ');
    if bad {
        return Err(OpenTunError::BadName(name.escape_default().to_string()));
    }
    let mut request = zeroed_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    Ok(request)
}

fn interface_name(request: &libc::ifreq) -> Option<String> {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|byte| *byte as u8).collect();
    Some(CStr::from_bytes_until_nul(&bytes).ok()?.to_str().ok()?.to_owned())
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
