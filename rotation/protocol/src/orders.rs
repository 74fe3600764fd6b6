//! What a person orders, as a change of the stored state: checked, and then written by
//! compare-and-swap like every other. The controller does the rest, also when the person has gone.

use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};

use crate::instance::Instance;
use crate::issuer::Again;
use crate::trust_domain::{
    AnchorState, Consumer, Exemption, Halt, Request, Taint, TrustDomainState,
};

/// Why an order is not taken: what is in the way, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderRefused {
    /// It cannot be undone from here.
    #[error("{0}")]
    Abort(&'static str),
    /// The store was restored from a backup.
    #[error(
        "the store was restored from a backup (seq {seen_seq} has been seen): nothing moves \
         before `steadfast trust recover`"
    )]
    Halted {
        /// The highest sequence number that was seen.
        seen_seq: u64,
    },
    /// There is none.
    #[error("no rotation is under way")]
    Idle,
    /// Not published, or gone.
    #[error("there is no anchor {0} in this state; `steadfast anchor list` names those that are")]
    NoAnchor(String),
    /// None of this name.
    #[error("no consumer has the name {0:?}; `steadfast consumer list` names them")]
    NoConsumer(String),
    /// Nothing else can be replaced so.
    #[error(
        "anchor {0} is no standby: `steadfast anchor rotate` replaces the active one, and what is \
         on its way in or out is the rotation's"
    )]
    NoStandby(String),
    /// It is exempt already, or is not.
    #[error("{0} is not exempt; `steadfast anchor status` names who is")]
    NotExempt(String),
    /// The rotation has gone on without it.
    #[error(
        "the rotation has gone on without {0}: the exemption ends by itself, when it acks what is \
         published or starts anew"
    )]
    ReliedOn(String),
    /// One at a time.
    #[error("rotation {0} is under way; `steadfast anchor status` shows it")]
    UnderWay(u64),
}

impl TrustDomainState {
    /// Asks for a rotation.
    ///
    /// # Errors
    /// One is under way or asked for, or the store was restored.
    pub fn request(&mut self, request: Request) -> Result<(), OrderRefused> {
        self.check_halt()?;
        if let Some(rotation) = &self.rotation {
            return Err(OrderRefused::UnderWay(rotation.number));
        }
        if self.requested.is_some() {
            return Err(OrderRefused::UnderWay(self.rotations + 1));
        }
        if let Some(id) = request.anchor
            && self.anchor(id).is_none_or(|anchor| anchor.state != AnchorState::Generated)
        {
            return Err(OrderRefused::NoAnchor(id.to_string()));
        }
        if let Some(id) = request.replaces
            && self.anchor(id).is_none_or(|anchor| anchor.state != AnchorState::Standby)
        {
            return Err(OrderRefused::NoStandby(id.to_string()));
        }
        let next = self.next_of(&request);
        self.unwanted.retain(|id| Some(*id) != next);
        self.requested = Some(request);
        Ok(())
    }

    /// The anchor that would become active by a request.
    fn next_of(&self, request: &Request) -> Option<KeyId> {
        let standby = || self.in_state(AnchorState::Standby).next().map(|standby| standby.id);
        request.anchor.or_else(|| request.replaces.is_none().then(standby).flatten())
    }

    /// Knows a holder of the bundle that cannot ack; one of this name is changed.
    pub fn add_consumer(&mut self, consumer: Consumer) {
        self.consumers.retain(|known| known.name != consumer.name);
        self.consumers.push(consumer);
    }

    /// Waits for this holder no more.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn remove_consumer(&mut self, name: &str) -> Result<(), OrderRefused> {
        let known = self.consumers.len();
        self.consumers.retain(|consumer| consumer.name != name);
        if self.consumers.len() == known {
            return Err(OrderRefused::NoConsumer(name.to_owned()));
        }
        Ok(())
    }

    /// Phases wait, or go on. Renewals, bundles and repairs go on in any case.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// A person undoes the rotation that is under way, or the request for one. What has proposed
    /// its anchor does not order it again.
    ///
    /// # Errors
    /// There is none, or there is no way back.
    pub fn abort(&mut self) -> Result<(), OrderRefused> {
        let next = match (&self.requested, &self.rotation) {
            (Some(request), _) => self.next_of(request),
            (None, Some(rotation)) => rotation.next_anchor(),
            (None, None) => None,
        };
        self.undo()?;
        next.into_iter().for_each(|id| self.turn_away(id));
        Ok(())
    }

    /// Nobody but a person orders a rotation to this anchor. Only external ones are proposed.
    pub(crate) fn turn_away(&mut self, id: KeyId) {
        if self.anchor(id).is_none_or(|anchor| !anchor.is_external()) {
            return;
        }
        self.unwanted.retain(|known| *known != id);
        self.unwanted.push(id);
        let too_many = self.unwanted.len().saturating_sub(UNWANTED_MAX);
        self.unwanted.drain(..too_many);
    }

    /// As [`TrustDomainState::abort`], for whoever may order the same again by itself.
    ///
    /// # Errors
    /// There is none, or there is no way back.
    pub fn undo(&mut self) -> Result<(), OrderRefused> {
        if self.requested.take().is_some() {
            return Ok(());
        }
        let Some(rotation) = &self.rotation else { return Err(OrderRefused::Idle) };
        if rotation.turned_back {
            return Err(OrderRefused::Abort("it is being undone already"));
        }
        rotation.leads_back(self).map_err(OrderRefused::Abort)?;
        self.rotation.iter_mut().for_each(|rotation| rotation.abort = true);
        Ok(())
    }

    /// No census waits for this instance any more. One that a phase was left without stays that,
    /// however often it is exempted.
    pub fn exempt(
        &mut self,
        instance: Instance,
        name: String,
        reason: String,
        by: String,
        now: UnixTime,
    ) {
        self.wait_no_more(Exemption { instance, at: now, name, reason, by, relied_on: false });
    }

    pub(crate) fn wait_no_more(&mut self, mut exemption: Exemption) {
        let is_it = |e: &Exemption| e.instance.pod_uid == exemption.instance.pod_uid;
        if let Some(known) = self.exemptions.iter().position(is_it) {
            exemption.relied_on |= self.exemptions.remove(known).relied_on;
        }
        self.exemptions.push(exemption);
    }

    /// Every census waits for it again.
    ///
    /// # Errors
    /// It is not exempt, or a phase was left without it.
    pub fn unexempt(&mut self, pod_uid: &str) -> Result<(), OrderRefused> {
        let found = self.exemptions.iter().position(|e| e.instance.pod_uid == pod_uid);
        let found = found.ok_or_else(|| OrderRefused::NotExempt(pod_uid.to_owned()))?;
        if self.exemptions[found].relied_on {
            return Err(OrderRefused::ReliedOn(self.exemptions[found].shown_name().to_owned()));
        }
        self.exemptions.remove(found);
        Ok(())
    }

    /// An anchor's key is, or may be, in other hands.
    ///
    /// # Errors
    /// There is no such anchor.
    pub fn taint(&mut self, id: KeyId, by: String, deadline: Duration) -> Result<(), OrderRefused> {
        let lives = |state: AnchorState| state != AnchorState::Withdrawn;
        let mut anchors = self.anchors.iter_mut();
        let anchor = anchors.find(|anchor| anchor.id == id && lives(anchor.state));
        let anchor = anchor.ok_or_else(|| OrderRefused::NoAnchor(id.to_string()))?;
        anchor.taint = Some(Taint { by, deadline });
        // An emergency waits for nobody.
        self.paused = false;
        Ok(())
    }

    /// Replaces the active issuer; with a deadline, because its key is in other hands. If the key of
    /// another one was, and is being replaced, that comes first.
    ///
    /// # Errors
    /// The store was restored.
    pub fn rotate_issuer(
        &mut self,
        by: String,
        urgent: Option<Duration>,
        now: UnixTime,
    ) -> Result<(), OrderRefused> {
        self.check_halt()?;
        let active = self.active_issuer;
        match (&mut self.issuer_rotation, urgent) {
            (None, _) => self.begin_issuer_rotation(by, urgent, now),
            (Some(rotation), Some(_)) if rotation.urgent.is_none() => {
                (rotation.urgent, rotation.by, rotation.old) = (urgent, by, active);
            }
            (Some(rotation), Some(deadline)) if rotation.old != active => {
                rotation.again = Some(Again { by, deadline });
            }
            // What is wanted is under way.
            (Some(_), _) => {}
        }
        Ok(())
    }

    /// Rotates to this issuer, which is there already; `false`: another rotation is under way.
    ///
    /// # Errors
    /// The store was restored.
    pub fn rotate_issuer_to(
        &mut self,
        id: KeyId,
        by: String,
        now: UnixTime,
    ) -> Result<bool, OrderRefused> {
        self.check_halt()?;
        if self.issuer_rotation.is_some() {
            return Ok(false);
        }
        self.begin_issuer_rotation(by, None, now);
        self.issuer_rotation.iter_mut().for_each(|rotation| rotation.to = Some(id));
        Ok(true)
    }

    /// The issuers under anchors of ours whose keys must be there: what is denied, withdrawn or has
    /// ended needs none, and external ones are for their owners to bring back.
    pub fn own_issuers(&self, now: UnixTime) -> impl Iterator<Item = KeyId> {
        let ours = |id| self.published().any(|anchor| anchor.id == id && !anchor.is_external());
        let own = self.issuers.iter().filter(move |issuer| {
            ours(issuer.anchor_id) && issuer.not_after > now && !self.denies(issuer.id)
        });
        own.map(|issuer| issuer.id)
    }

    /// These issuers' keys are gone, and those of all others are there. The active one is replaced;
    /// where somebody removes one key after the other, once an hour. `false`: nothing has changed.
    pub fn set_lost_issuers(&mut self, lost: Vec<KeyId>, now: UnixTime) -> bool {
        let is_news = lost != self.lost_issuers;
        self.lost_issuers = lost;
        let lately = self.past.iter().any(|past| {
            past.by == LOST_KEY && past.kind == "issuer" && now < past.ended + LOST_AGAIN_AFTER
        });
        // Under an anchor that is not active, another anchor's takes its place in any case.
        let signs = self.active_issuer().zip(self.active_anchor());
        let signs = signs.is_some_and(|(issuer, anchor)| issuer.anchor_id == anchor.id);
        let lost = signs && self.lost_issuers.contains(&self.active_issuer);
        let replaces = lost && !lately && self.issuer_rotation.is_none();
        is_news | (replaces && self.rotate_issuer(LOST_KEY.to_owned(), None, now).is_ok())
    }

    pub(crate) fn check_halt(&self) -> Result<(), OrderRefused> {
        match self.halted {
            Some(Halt::Restored { seen_seq }) => Err(OrderRefused::Halted { seen_seq }),
            None => Ok(()),
        }
    }
}

/// Each rotation leaves a record of an issuer for as long as that would have lived.
const LOST_AGAIN_AFTER: Duration = Duration::from_secs(3600);
/// By whom a rotation is ordered away from a key that is gone.
pub(crate) const LOST_KEY: &str = "lost key";
/// The newest of those that were turned back: what lists older ones has been mended long since.
const UNWANTED_MAX: usize = 16;
