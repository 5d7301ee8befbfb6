//! Workers that hang, and faults of the data plane.

use super::*;

/// Behaviour of a faulty TUN when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Reading {
    #[default]
    Works,
    /// The call blocks until the behaviour changes.
    Hangs,
    /// The call is blocked.
    Hanging,
    Fails,
    Panics,
}

/// TUN in memory that can be made to fail.
struct FaultyTun {
    tun: MemoryTun,
    reading: Arc<(Mutex<Reading>, Condvar)>,
}

impl TunIo for FaultyTun {
    fn fd(&self) -> BorrowedFd<'_> {
        self.tun.fd()
    }

    fn mtu(&self) -> usize {
        self.tun.mtu()
    }

    fn read(&mut self, batch: &mut TunBatch, drops: &Drops) -> std::io::Result<()> {
        let (reading, changed) = &*self.reading;
        let mut reading = reading.lock().unwrap();
        while matches!(*reading, Reading::Hangs | Reading::Hanging) {
            *reading = Reading::Hanging;
            changed.notify_all();
            reading = changed.wait(reading).unwrap();
        }
        match *reading {
            Reading::Fails => Err(std::io::Error::other("it was deleted")),
            Reading::Panics => {
                drop(reading);
                panic!("the test makes the TUN panic")
            }
            _ => self.tun.read(batch, drops),
        }
    }

    fn coalesce(&self) -> Coalesce {
        self.tun.coalesce()
    }

    fn write(&mut self, now: Instant, batch: &WriteBatch, drops: &Drops) {
        self.tun.write(now, batch, drops);
    }

    fn features(&self) -> Vec<Switch> {
        self.tun.features()
    }
}

/// Data plane with two workers, the second of which has a TUN that can be made to fail.
struct Faulty {
    plane: DataPlane,
    host: MemoryHost,
    reading: Arc<(Mutex<Reading>, Condvar)>,
    /// Channel of events, which is full from the start and never read.
    events: Receiver<Event>,
}

impl Faulty {
    fn new() -> Self {
        let network = Network::new();
        let (good, _) = memory::tun(1420).unwrap();
        let (tun, host) = memory::tun(1420).unwrap();
        let reading = Arc::new((Mutex::new(Reading::Works), Condvar::new()));
        let tuns = [Arc::default(), reading.clone()].into_iter().zip([good, tun]);
        let shards = tuns.enumerate().map(|(number, (reading, tun))| {
            let address = SocketAddr::from(([192, 0, 2, number as u8], 51830));
            (FaultyTun { tun, reading }, network.bind(address).unwrap())
        });
        let (sender, events) = channel(1);
        let (peer, message) = (WireguardKey([7; 32]), Probe::Ping { transaction: 7 });
        let from = SocketAddr::from(([1; 4], 1)).into();
        sender.try_send(Event::Probe { peer, from, is_validated: false, message }).unwrap();
        let plane = DataPlane::start(config(1, Engine::BORINGTUN), shards, sender).unwrap();
        Self { plane, host, reading, events }
    }

    fn read(&self, how: Reading) {
        *self.reading.0.lock().unwrap() = how;
        self.reading.1.notify_all();
        self.host.send(&[0x45; 20]);
    }

    /// Makes the TUN block, and waits until the worker hangs in it.
    fn hang(&self) {
        self.read(Reading::Hangs);
        let (reading, changed) = &*self.reading;
        let mut reading = reading.lock().unwrap();
        while *reading != Reading::Hanging {
            let (next, timeout) = changed.wait_timeout(reading, TIMEOUT).unwrap();
            assert!(!timeout.timed_out(), "the worker does not read");
            reading = next;
        }
    }

    /// Waits until [`DataPlane::stalled_workers`] returns this number. It must never return a
    /// smaller one.
    fn stalled(&self, workers: usize) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let stalled = self.plane.stalled_workers();
            assert!(stalled >= workers, "{stalled} workers are stalled");
            if stalled == workers {
                return;
            }
            assert!(Instant::now() < deadline, "{stalled} workers are stalled");
            std::thread::yield_now();
        }
    }

    fn fault(&self) -> Fault {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let mut faults = self.plane.faults();
        runtime.block_on(async {
            let fault = tokio::time::timeout(TIMEOUT, faults.wait_for(Option::is_some)).await;
            fault.expect("a fault in time").unwrap().clone().unwrap()
        })
    }
}

#[test]
fn a_worker_that_hangs_is_noticed_while_idle_ones_are_not_and_holds_up_nobody() {
    let faulty = Faulty::new();
    for _ in 0..3 {
        faulty.stalled(0);
    }
    faulty.hang();
    faulty.plane.stalled_workers();
    for _ in 0..100 {
        faulty.stalled(1);
    }
    // The calls of the daemon still work.
    faulty.plane.apply(&PeerTable::default());
    faulty.plane.snapshot();
    for _ in 0..10_000 {
        faulty.plane.send(SocketAddr::from(([192, 0, 2, 9], 1)).into(), b"order");
    }
    // The other worker ends, however slow this machine is.
    let (timeout, deadline) = (Duration::from_millis(200), Instant::now() + TIMEOUT);
    loop {
        let stuck = faulty.plane.stop_within(timeout);
        if stuck == Err(StuckWorkers { workers: 1, timeout }) {
            break;
        }
        let is_early = stuck == Err(StuckWorkers { workers: 2, timeout });
        assert!(is_early && Instant::now() < deadline, "{stuck:?}");
    }
    faulty.read(Reading::Works);
    assert_eq!(faulty.plane.stop(), Ok(()));
}

#[test]
fn orders_that_a_worker_does_not_take_are_bounded_and_counted() {
    let network = Network::new();
    let (tun, host) = memory::tun(1420).unwrap();
    let reading = Arc::new((Mutex::new(Reading::Hangs), Condvar::new()));
    let shard = (
        FaultyTun { tun, reading: reading.clone() },
        network.bind(SocketAddr::from(([192, 0, 2, 1], 51830))).unwrap(),
    );
    let (sender, _events) = channel(8);
    let plane = DataPlane::start(config(1, Engine::BORINGTUN), [shard], sender).unwrap();
    host.send(&[0x45; 20]);
    let deadline = Instant::now() + TIMEOUT;
    // The worker handles some commands before it hangs.
    while plane.snapshot().drops["orders_full"] < 1_000 {
        assert!(Instant::now() < deadline, "{:?}", plane.snapshot());
        plane.send(SocketAddr::from(([192, 0, 2, 9], 1)).into(), b"order");
    }
    *reading.0.lock().unwrap() = Reading::Works;
    reading.1.notify_all();
    assert_eq!(plane.stop(), Ok(()));
}

#[test]
fn a_fault_is_seen_though_the_channel_of_events_is_full() {
    for (how, wanted) in [
        (Reading::Fails, Fault::TunGone("it was deleted".to_owned())),
        (Reading::Panics, Fault::Panicked),
    ] {
        let mut faulty = Faulty::new();
        faulty.read(how);
        assert_eq!(faulty.fault(), wanted);
        assert_eq!(faulty.fault(), wanted, "a late reader finds it too");
        assert!(faulty.events.try_recv().is_ok() && faulty.events.try_recv().is_err());
        assert_eq!(faulty.plane.stop(), Ok(()));
    }
}
