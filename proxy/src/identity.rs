//! The workload's identity: what the configuration says, in the words of the identity client, and
//! each worker's own copy of what it publishes.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_identity_client::{
    BootstrapBundle, Config, Follower, Footing, TlsContext, VerifiedPeer,
};
use tokio::sync::watch;

use crate::config::{Anchors, Identity};
use crate::io::BoxIo;
use crate::metrics::Direction;
use crate::refusal::Refusal;
use crate::standing::{Cut, Guarded, Stand, Standings};

/// The identity client's configuration.
pub fn client_config(identity: &Identity) -> Config {
    Config {
        local: identity.local_name.clone(),
        identity_address: identity.service.addr.clone(),
        identity_name: identity.service.name.clone(),
        token_file: identity.token_file.clone(),
        bootstrap: match &identity.anchors {
            Anchors::File(file) => BootstrapBundle::File(file.clone()),
            Anchors::Pem(pem) => BootstrapBundle::Pem(pem.clone()),
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// A worker's copy of the newest TLS snapshot: taking it locks nothing.
#[derive(Clone, Debug)]
pub struct Tls {
    current: Rc<RefCell<Arc<TlsContext>>>,
    /// Rises with each snapshot: who holds a connection of an older one learns of it here.
    generation: Rc<watch::Sender<u64>>,
    /// Says which snapshot this worker uses: an ack waits for it.
    follower: Rc<Follower>,
    /// The worker's connections by mutual TLS.
    standings: Standings,
}

impl Tls {
    /// The newest snapshot that the watch has.
    pub fn new(contexts: &mut watch::Receiver<Arc<TlsContext>>) -> Self {
        let context = contexts.borrow_and_update().clone();
        let generation = Rc::new(watch::Sender::new(context.generation));
        let follower = Rc::new(context.follower());
        let (current, standings) = (Rc::new(RefCell::new(context)), Standings::default());
        Self { current, generation, follower, standings }
    }

    /// The snapshot of now.
    pub fn now(&self) -> Arc<TlsContext> {
        self.current.borrow().clone()
    }

    /// Its generation, to be waited on.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Takes a connection that was made with a snapshot: from now on it obeys each new bundle.
    ///
    /// # Errors
    /// [`Refusal::Distrusted`]: the bundle has changed since its handshake began.
    pub fn hold(
        &self,
        made_with: &TlsContext,
        peer: Option<Arc<VerifiedPeer>>,
        place: (Direction, SocketAddr),
        io: BoxIo,
    ) -> Result<(Guarded, Stand), Refusal> {
        let (footing, now) = (Footing::new(made_with, peer), self.now());
        self.standings.hold(footing, now.bundle.as_deref(), place, io)
    }

    /// Copies each new snapshot until the publisher is gone. `told` is called with each connection
    /// that a new bundle cuts.
    pub async fn follow(&self, mut contexts: watch::Receiver<Arc<TlsContext>>, told: impl Fn(Cut)) {
        loop {
            let context = contexts.borrow_and_update().clone();
            let generation = context.generation;
            self.current.replace(context.clone());
            // Before the word that it is used: who acks a bundle obeys it on open connections too.
            if let Some(trust) = &context.bundle {
                self.standings.judge(trust).into_iter().for_each(&told);
            }
            if let Some(svid) = &context.svid {
                self.standings.supersede(svid.verified().issuer);
            }
            self.follower.uses(generation);
            self.generation
                .send_if_modified(|old| std::mem::replace(old, generation) != generation);
            if contexts.changed().await.is_err() {
                return;
            }
        }
    }
}

/// When a connection between these two should end: at 90 % of the life of the older SVID, life
/// being counted from issue. One that begins later than that, because a renewal is late, lasts as
/// long as the SVIDs do: there is no newer one to come back with. `None`: nothing of it expires.
pub fn retire_at(
    context: &TlsContext,
    peer: Option<&VerifiedPeer>,
    now: UnixTime,
) -> Option<UnixTime> {
    let peer_life = peer.map(|peer| (peer.not_before + BACKDATED, peer.not_after));
    let own = context.svid.as_deref();
    let own_life = own.map(|own| (own.issued_at(), own.facts().not_after));
    retirement(peer_life.into_iter().chain(own_life), now)
}

/// When the first of two SVIDs ends.
pub fn expires_at(context: &TlsContext, peer: Option<&VerifiedPeer>) -> Option<UnixTime> {
    let own = context.svid.as_deref().map(|own| own.facts().not_after);
    peer.map(|peer| peer.not_after).into_iter().chain(own).min()
}

/// Each life is from issue to end.
fn retirement(
    lives: impl Iterator<Item = (UnixTime, UnixTime)> + Clone,
    now: UnixTime,
) -> Option<UnixTime> {
    let ninety_percent = |(issued_at, not_after): (UnixTime, UnixTime)| {
        issued_at + not_after.since(issued_at) * 9 / 10
    };
    let at = lives.clone().map(ninety_percent).min()?;
    if now < at { Some(at) } else { lives.map(|(_, not_after)| not_after).min() }
}

/// SVIDs begin this long before they are made, for clocks that are behind.
const BACKDATED: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use steadfast_api::TrustBundle;
    use steadfast_identity_client::{Contexts, Trust};
    use steadfast_process::SystemClock;

    use super::*;
    use crate::fakes::ANCHOR;

    #[tokio::test]
    async fn a_worker_says_which_snapshot_it_uses() {
        let contexts = Contexts::new(Arc::new(SystemClock));
        let tls = Tls::new(&mut contexts.subscribe());
        let domain = "cluster.local".parse().unwrap();
        let bundle = TrustBundle::parse(&domain, ANCHOR.as_bytes()).unwrap();
        let trust = Arc::new(Trust::new(&bundle, [], []).unwrap());
        let generation = contexts.publish(None, trust).unwrap().generation;
        assert!(!contexts.observed().all_use(generation), "its copy is the one before");
        let mut newest = tls.generation();
        tokio::select! {
            () = tls.follow(contexts.subscribe(), drop) => panic!("the publisher is there"),
            seen = newest.wait_for(|&seen| seen == generation) => drop(seen.unwrap()),
        }
        assert!(contexts.observed().all_use(generation));
        drop(tls);
    }

    fn lives() -> impl Iterator<Item = (UnixTime, UnixTime)> + Clone {
        let life = |from, secs| {
            let issued_at = UnixTime::from_secs(from);
            (issued_at, issued_at + Duration::from_secs(secs))
        };
        [life(1000, 100), life(1050, 100)].into_iter()
    }

    #[test]
    fn a_connection_ends_at_ninety_percent_of_the_older_life_from_issue() {
        let now = UnixTime::from_secs(1060);
        assert_eq!(retirement(lives(), now), Some(UnixTime::from_secs(1090)));
        assert_eq!(retirement(std::iter::empty(), now), None);
    }

    #[test]
    fn one_that_begins_late_lasts_to_the_end() {
        let now = UnixTime::from_secs(1090);
        assert_eq!(retirement(lives(), now), Some(UnixTime::from_secs(1100)));
    }
}
