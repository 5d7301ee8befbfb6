//! Cases of the benchmark: what each measures, and how.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use towline_netlink::OverlayKind;

use super::load::{self, Carried, Congestion, Cpu, Window};
use super::subject::Subject;
use crate::lab::ping;
use crate::lab::traffic::Pattern;

/// A kind of measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Case {
    /// One TCP stream.
    #[value(name = "tcp1")]
    Tcp1,
    /// One TCP stream in the opposite direction.
    #[value(name = "tcp1_rev")]
    Tcp1Reverse,
    /// One TCP stream with BBR congestion control.
    #[value(name = "tcp1_bbr")]
    Tcp1Bbr,
    /// Four TCP streams.
    #[value(name = "tcp4")]
    Tcp4,
    /// Two TCP streams in each direction.
    #[value(name = "bidir")]
    BothWays,
    /// UDP datagrams of 64 bytes.
    #[value(name = "udp_small")]
    UdpSmall,
    /// UDP datagrams of 1,200 bytes.
    #[value(name = "udp_1200")]
    Udp1200,
    /// One TCP stream in VXLAN inside the tunnel.
    #[value(name = "vxlan")]
    Vxlan,
    /// One TCP stream in Geneve inside the tunnel.
    #[value(name = "geneve")]
    Geneve,
    /// Echo requests one after another (`ping -A`).
    #[value(name = "ping")]
    Ping,
    /// Echo requests during a TCP stream.
    #[value(name = "ping_loaded")]
    PingLoaded,
    /// One TCP stream over inner IPv6.
    #[value(name = "inner_v6")]
    InnerV6,
    /// One TCP stream in a tunnel over IPv6.
    #[value(name = "outer_v6")]
    OuterV6,
    /// One TCP stream while 0.1 % of the outer datagrams are lost.
    #[value(name = "loss_0.1")]
    Loss1,
    /// One TCP stream while 1 % of the outer datagrams are lost.
    #[value(name = "loss_1")]
    Loss10,
    /// One TCP stream between agents with 1,000 peers.
    #[value(name = "peers1000")]
    Peers1000,
    /// Four TCP streams between agents with two workers.
    #[value(name = "tcp4_2workers")]
    Tcp4Workers2,
    /// Echo requests one after another between agents with two workers.
    #[value(name = "ping_2workers")]
    PingWorkers2,
}

/// Figures of one run of a case.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Measured value in [`Case::unit`].
    pub(super) value: f64,
    /// Processor time for each gigabit of payload. `None` if the case does not measure it.
    pub(super) cpu: Option<Cpu>,
    /// Counters of the traffic.
    pub(super) carried: Carried,
}

/// Number of echo requests of a run.
const ECHOES: u32 = 400;
/// Limit for one echo reply.
const ECHO_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between two echo requests during a TCP stream.
const LOADED_PACE: Duration = Duration::from_millis(5);

impl Case {
    pub(super) const ALL: [Self; 18] = [
        Self::Tcp1,
        Self::Tcp1Reverse,
        Self::Tcp1Bbr,
        Self::Tcp4,
        Self::BothWays,
        Self::UdpSmall,
        Self::Udp1200,
        Self::Vxlan,
        Self::Geneve,
        Self::Ping,
        Self::PingLoaded,
        Self::InnerV6,
        Self::OuterV6,
        Self::Loss1,
        Self::Loss10,
        Self::Peers1000,
        Self::Tcp4Workers2,
        Self::PingWorkers2,
    ];

    /// Returns the name of the case in the figures and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp1",
            Self::Tcp1Reverse => "tcp1_rev",
            Self::Tcp1Bbr => "tcp1_bbr",
            Self::Tcp4 => "tcp4",
            Self::BothWays => "bidir",
            Self::UdpSmall => "udp_small",
            Self::Udp1200 => "udp_1200",
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
            Self::Ping => "ping",
            Self::PingLoaded => "ping_loaded",
            Self::InnerV6 => "inner_v6",
            Self::OuterV6 => "outer_v6",
            Self::Loss1 => "loss_0.1",
            Self::Loss10 => "loss_1",
            Self::Peers1000 => "peers1000",
            Self::Tcp4Workers2 => "tcp4_2workers",
            Self::PingWorkers2 => "ping_2workers",
        }
    }

    /// Returns a description of the case.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP, one stream",
            Self::Tcp1Reverse => "TCP, one stream, reverse",
            Self::Tcp1Bbr => "TCP, one stream, BBR",
            Self::Tcp4 => "TCP, four streams",
            Self::BothWays => "TCP, two streams each way",
            Self::UdpSmall => "UDP, 64 bytes",
            Self::Udp1200 => "UDP, 1200 bytes",
            Self::Vxlan => "TCP in VXLAN",
            Self::Geneve => "TCP in Geneve",
            Self::Ping => "ping -A",
            Self::PingLoaded => "ping beside a TCP stream",
            Self::InnerV6 => "TCP over IPv6",
            Self::OuterV6 => "TCP, tunnel over IPv6",
            Self::Loss1 => "TCP, 0.1 % lost",
            Self::Loss10 => "TCP, 1 % lost",
            Self::Peers1000 => "TCP, 1000 peers in the table",
            Self::Tcp4Workers2 => "TCP, four streams, two workers",
            Self::PingWorkers2 => "ping -A, two workers",
        }
    }

    /// Returns whether the case needs a kernel feature that is often absent.
    pub(super) fn is_optional(self) -> bool {
        matches!(self, Self::Geneve | Self::Tcp1Bbr)
    }

    /// Returns the unit of the measured value.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::UdpSmall | Self::Udp1200 => "Mpps",
            Self::Ping | Self::PingLoaded | Self::PingWorkers2 => "ms",
            _ => "Gb/s",
        }
    }

    /// Runs the case once.
    pub(super) fn run(
        self,
        subject: &Subject,
        window: Window,
        pattern: Pattern,
    ) -> anyhow::Result<Outcome> {
        let (there, back) = (subject.there(false), subject.back(false));
        let tcp_of = |congestion, ways: &[load::Way<'_>]| {
            load::tcp(ways, congestion, window, &subject.daemons, || Ok(())).map(Outcome::of_tcp)
        };
        let tcp = |ways: &[load::Way<'_>]| tcp_of(Congestion::Cubic, ways);
        let udp = |size| load::udp(&[there], size, window, &subject.daemons).map(Outcome::of_udp);
        match self {
            Self::Tcp1 | Self::OuterV6 | Self::Peers1000 => tcp(&[there]),
            Self::Tcp1Reverse => tcp(&[back]),
            Self::Tcp1Bbr => tcp_of(Congestion::Bbr, &[there]),
            Self::Tcp4 | Self::Tcp4Workers2 => tcp(&[there; 4]),
            Self::BothWays => tcp(&[there, back, there, back]),
            Self::UdpSmall => udp(64),
            Self::Udp1200 => udp(1200),
            Self::Vxlan => tcp(&[subject.overlay(OverlayKind::Vxlan)?]),
            Self::Geneve => tcp(&[subject.overlay(OverlayKind::Geneve)?]),
            Self::InnerV6 => tcp(&[subject.there(true)]),
            Self::Loss1 => subject.losing(1, || tcp(&[there])),
            Self::Loss10 => subject.losing(10, || tcp(&[there])),
            Self::Ping | Self::PingWorkers2 => {
                warm_up();
                let echoes =
                    ping::echoes(there.from, there.address, ECHOES, ECHO_TIMEOUT, pattern)?;
                let median = echoes.median.context("no echo reply arrived")?;
                Ok(Outcome::of_ping(median, Carried::default()))
            }
            Self::PingLoaded => {
                let mut median = None;
                let (cubic, daemons) = (Congestion::Cubic, &subject.daemons);
                let carried = load::tcp(&[there], cubic, window, daemons, || {
                    let over = AtomicBool::new(false);
                    median = std::thread::scope(|scope| {
                        let asked = scope
                            .spawn(|| ping::paced(there.from, there.address, LOADED_PACE, &over));
                        let passed = crate::lab::interrupt::sleep(window.length);
                        over.store(true, Ordering::Relaxed);
                        let asked = asked.join().unwrap_or(Ok(None));
                        passed.map_err(anyhow::Error::from).and(asked)
                    })?;
                    Ok(())
                })?;
                Ok(Outcome::of_ping(median.context("no echo reply arrived")?, carried))
            }
        }
    }
}

/// Time for which every core is busy before echo requests are measured.
const WARM_UP: Duration = Duration::from_millis(300);

/// Keeps every core busy for a moment. An idle core of a virtual machine wakes up two to four times later once
/// it was idle for long, so that latency would depend on what was measured before.
fn warm_up() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let began = Instant::now();
                while began.elapsed() < WARM_UP {
                    std::hint::spin_loop();
                }
            });
        }
    });
}

impl Outcome {
    fn of_tcp(carried: Carried) -> Self {
        Self { value: carried.gbit_per_s(), cpu: Some(carried.cpu_per_gbit()), carried }
    }

    fn of_udp(carried: Carried) -> Self {
        Self { value: carried.mpps(), cpu: Some(carried.cpu_per_gbit()), carried }
    }

    fn of_ping(median: Duration, carried: Carried) -> Self {
        Self { value: median.as_secs_f64() * 1e3, cpu: None, carried }
    }
}
