//! One worker thread: its listeners, its copies of the snapshots, and all of its connections.
//!
//! Nothing that lives here is `Send`; what workers share with the control thread is in [`Shared`].
//! Every connection is a task of the worker's tracker, so that a drain can wait for it; one that
//! panics is counted and takes nothing else with it.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{LocalBoxFuture, try_join_all};
use steadfast_identity_client::{Refusals, TlsContext};
use steadfast_process::{Clock, Drain};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::LocalSet;

use crate::accept::{self, Accepted, Shares, Slots};
use crate::config::Config;
use crate::connect::{Connect, TcpDial};
use crate::discovery::Discovery;
use crate::forward::Scratch;
use crate::http;
use crate::identity::Tls;
use crate::inbound::Inbound;
use crate::lifetime::{Ages, Distrust};
use crate::metrics::{Direction, Metrics};
use crate::outbound::Outbound;
use crate::policy::DefaultPolicies;
use crate::refusal::{Refusal, Reporter};
use crate::standing::Cut;
use crate::target::Target;
use crate::tasks::Tasks;

/// What workers share with each other and with the control thread.
#[derive(Clone)]
pub struct Shared {
    /// What the process was told.
    pub config: Arc<Config>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// What is counted.
    pub metrics: Metrics,
    /// Counts and logs refused handshakes.
    pub handshakes: Refusals,
    /// Where names lead; `None`: nobody to ask.
    pub discovery: Option<Discovery>,
    /// What TLS uses.
    pub contexts: watch::Receiver<Arc<TlsContext>>,
    /// Who may connect.
    pub policies: DefaultPolicies,
    /// Bytes that all connections together may leave unread.
    pub budget: http::Budget,
    /// Asks everyone to finish.
    pub drain: Drain,
}

impl Shared {
    /// How long bytes are copied.
    pub fn ages(&self, reporter: Rc<Reporter>) -> Ages {
        let (clock, outliving) = (self.clock.clone(), self.metrics.outliving.clone());
        let (withdrawn, deadline) =
            (self.metrics.withdrawn.clone(), self.config.withdrawn_deadline);
        let distrust = Distrust { withdrawn, deadline, reporter };
        Ages::new(clock, outliving, self.config.connection_age_max, distrust)
    }

    /// No task yet.
    fn tasks(&self) -> Tasks {
        Tasks::new(self.metrics.panics.clone())
    }
}

/// The listening sockets of one worker.
pub struct Listeners {
    /// For peers.
    pub inbound: std::net::TcpListener,
    /// For the workload.
    pub outbound: std::net::TcpListener,
    /// For the workload, each for one destination.
    pub mapped: Vec<(std::net::TcpListener, Target)>,
}

/// Runs a worker until the drain has started and its last connection has ended.
///
/// # Errors
/// No runtime, or a listener that cannot be used.
pub fn run(shared: Shared, listeners: Listeners, shares: Shares) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, serve(shared, listeners, shares))
}

async fn serve(shared: Shared, listeners: Listeners, shares: Shares) -> io::Result<()> {
    let mut contexts = shared.contexts.clone();
    let tls = Tls::new(&mut contexts);
    let (connections, tasks) = (shared.tasks(), shared.tasks());
    let worker = Worker::new(&shared, tls.clone(), &tasks);
    let accepting = worker.accepting(listeners, shares, &connections);
    let work = async {
        try_join_all(accepting).await?;
        connections.finished().await;
        // Pooled connections run as tasks, and end once nobody holds them.
        worker.connect.clear();
        tasks.finished().await;
        Ok(())
    };
    let told = |(direction, addr, refusal): Cut| {
        let now = shared.clock.since_boot();
        worker.reporter.report(now, direction, addr, &refusal);
    };
    tokio::select! {
        result = work => result,
        () = tls.follow(contexts, told) => std::future::pending().await,
        () = worker.keep_house(&tls) => std::future::pending().await,
    }
}

/// The stories of one worker and what they share.
struct Worker {
    shared: Shared,
    connect: Rc<Connect>,
    inbound: Rc<Inbound>,
    outbound: Rc<Outbound>,
    reporter: Rc<Reporter>,
}

impl Worker {
    fn new(shared: &Shared, tls: Tls, tasks: &Tasks) -> Self {
        let reporter = Rc::new(Reporter::new(shared.metrics.clone(), shared.handshakes.clone()));
        let http = http::Worker::new(tasks.clone(), shared.budget.clone());
        let (own, inbound) = (shared.config.own_listeners(), shared.config.inbound.listen);
        let dial = Rc::new(TcpDial::new(own, inbound));
        let connect = Connect::new(shared, tls.clone(), dial, http.clone(), reporter.clone());
        let (connect, scratch) = (Rc::new(connect), Scratch::new());
        let inbound = Inbound::new(
            shared,
            tls,
            connect.clone(),
            http.clone(),
            scratch.clone(),
            reporter.clone(),
        );
        let outbound = Outbound::new(shared, connect.clone(), http, scratch, reporter.clone());
        let (inbound, outbound) = (Rc::new(inbound), Rc::new(outbound));
        Self { shared: shared.clone(), connect, inbound, outbound, reporter }
    }

    /// Lets go of what is no longer used: at each new TLS snapshot, and every few seconds.
    async fn keep_house(&self, tls: &Tls) {
        let mut generation = tls.generation();
        loop {
            // Either is a reason to look; what there is to do is a level.
            let _ = tokio::time::timeout(HOUSEKEEPING, generation.changed()).await;
            self.connect.sweep();
            self.outbound.sweep();
        }
    }

    /// One loop for each listener.
    fn accepting(
        &self,
        listeners: Listeners,
        shares: Shares,
        connections: &Tasks,
    ) -> Vec<LocalBoxFuture<'static, io::Result<()>>> {
        let inbound = self.inbound.clone();
        let serve = move |conn| inbound.clone().serve(conn).boxed_local();
        let (at, to) = (Direction::Inbound, connections);
        let mut loops = vec![self.accept(listeners.inbound, shares.inbound, at, to, serve)];
        let unmapped = (listeners.outbound, None);
        let mapped =
            listeners.mapped.into_iter().map(|(listener, target)| (listener, Some(target)));
        for (listener, target) in [unmapped].into_iter().chain(mapped) {
            let outbound = self.outbound.clone();
            let serve = move |conn| outbound.clone().serve(conn, target.clone()).boxed_local();
            let slots = shares.outbound.clone();
            loops.push(self.accept(listener, slots, Direction::Outbound, to, serve));
        }
        loops
    }

    /// Accepts on one listener; every connection becomes a task whose outcome is told once.
    fn accept(
        &self,
        listener: std::net::TcpListener,
        slots: Slots,
        direction: Direction,
        connections: &Tasks,
        serve: impl Fn(Accepted<TcpStream>) -> LocalBoxFuture<'static, Result<(), Refusal>> + 'static,
    ) -> LocalBoxFuture<'static, io::Result<()>> {
        let (tasks, reporter) = (connections.clone(), self.reporter.clone());
        let (clock, drain) = (self.shared.clock.clone(), self.shared.drain.clone());
        let none_left = {
            let (reporter, clock) = (self.reporter.clone(), self.shared.clock.clone());
            let waiting = self.shared.metrics.waiting(direction).clone();
            move |client| {
                let refusal = Refusal::Overloaded("all slots for connections are taken: it waits");
                reporter.report(clock.since_boot(), direction, client, &refusal);
                waiting.hold()
            }
        };
        let each = move |stream: TcpStream, client: SocketAddr, slot: OwnedSemaphorePermit| {
            let Ok(accepted) = accept::accepted(stream, client) else { return };
            let (connection, reporter) = (serve(accepted), reporter.clone());
            let clock = clock.clone();
            tasks.spawn_counted(async move {
                let _slot = slot;
                if let Err(refusal) = connection.await {
                    reporter.report(clock.since_boot(), direction, client, &refusal);
                }
            });
        };
        accept::run(listener, slots, drain, none_left, each).boxed_local()
    }
}

/// Idle connections and targets are looked through this often.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
