//! What the tools of an operator keep, such as the bundle that trust-manager writes and the issuer
//! that cert-manager renews: proposals, which become orders once nobody would notice.
//!
//! An anchor that is listed is rotated to when an issuer under it is there. One that is listed no
//! more stays until a rotation has replaced it, and one that is replaced stays until it is listed no
//! more. Whatever cannot be taken is held, and told with its name and the way out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use steadfast_api::{KeyId, TrustAnchor, UnixTime};
use steadfast_identity::import;
use steadfast_platform::kubernetes::watched::Changes;
use steadfast_platform::store::{ISSUER_PROPOSAL_KEY, TRUST_DOMAIN_KEY};
use steadfast_platform::{Store, StoreError};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::{Standing, Timings};
use steadfast_rotation_protocol::import::{ImportRefused, IssuerProposal, ProposedIssuer};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::schedule::Window;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, IssuerRecord, IssuerRequest, Request,
};
use tokio::sync::watch;

/// What is proposed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// Where the bundle is, for people; by this name rotations are ordered.
    pub bundle: String,
    /// The anchors that it lists, in its order; or why it lists nothing.
    pub listed: Result<Vec<Listed>, String>,
    /// Whether a tool makes the issuers too.
    pub makes_issuers: bool,
    /// The issuer, where one was found.
    pub issuer: Option<IssuerProposal>,
    /// The hours that rotations wait for; `None`: they may begin now.
    pub waits_for: Option<Window>,
    /// An issuer with less than this left, or than a third of its life, is replaced.
    pub issuer_left_min: Duration,
}

/// An anchor that is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// Its certificate, PEM.
    pub pem: String,
}

/// What becomes of proposals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The state with new orders, if there are any.
    pub ordered: Option<TrustDomainState>,
    /// What is held, each with what is in its way.
    pub held: Vec<String>,
}

/// Decides: what may be taken is ordered in the state of this revision.
pub fn decide(
    before: &TrustDomainState,
    revision: u64,
    proposed: &Proposed,
    now: UnixTime,
) -> Decision {
    // A person is to look first.
    if before.halted.is_some() {
        return Decision::default();
    }
    let mut deciding =
        Deciding { state: before.clone(), revision, proposed, now, held: Vec::new() };
    let anchors = deciding.anchors();
    match &proposed.issuer {
        Some(IssuerProposal { source, found: Err(fault) }) => {
            deciding.held.push(format!("{source}: {fault}"));
        }
        Some(IssuerProposal { source, found: Ok(issuer) }) => {
            if let Err(why) = deciding.issuer(issuer, &anchors) {
                let issuer = issuer.id.short();
                deciding.held.push(format!("{source}: the issuer {issuer} is held: {why}"));
            }
        }
        None if proposed.makes_issuers => {}
        None => deciding.next_anchor(&anchors),
    }
    let Deciding { state, held, .. } = deciding;
    Decision { ordered: (state != *before).then_some(state), held }
}

struct Deciding<'a> {
    state: TrustDomainState,
    revision: u64,
    proposed: &'a Proposed,
    now: UnixTime,
    held: Vec<String>,
}

impl Deciding<'_> {
    /// The anchors that are listed and may be rotated to, or are there.
    fn anchors(&mut self) -> Vec<AnchorRecord> {
        let bundle = &self.proposed.bundle;
        let listed = match &self.proposed.listed {
            Ok(listed) => listed,
            Err(fault) => {
                self.held.push(format!("{bundle}: {fault}; what it listed before stays"));
                return Vec::new();
            }
        };
        let mut anchors = Vec::new();
        for Listed { id, pem } in listed {
            match self.anchor(*id, pem) {
                Ok(anchor) => anchors.push(anchor),
                Err(why) => {
                    self.held.push(format!("{bundle}: the anchor {} is held: {why}", id.short()));
                }
            }
        }
        let is_listed = |id| listed.iter().any(|listed| listed.id == id);
        self.state.unwanted.retain(|id| is_listed(*id));
        let stays = self.state.published().filter(|anchor| {
            anchor.is_external() && anchor.state != AnchorState::Retiring && !is_listed(anchor.id)
        });
        let stays = stays.map(|anchor| {
            let (id, state) = (anchor.id.short(), format!("{:?}", anchor.state).to_lowercase());
            format!(
                "{bundle}: the anchor {id} is listed no more, and is {state}: it stays until a \
                 rotation has replaced it"
            )
        });
        if self.state.rotation.is_none() && self.state.requested.is_none() {
            self.held.extend(stays);
        }
        anchors
    }

    fn anchor(&self, id: KeyId, pem: &str) -> Result<AnchorRecord, String> {
        if self.state.tombstones.contains(&id) {
            return Err(ImportRefused::Tombstoned(id.to_string()).to_string());
        }
        let read = import::anchor(&self.state.trust_domain, pem.as_bytes(), self.now);
        match self.state.anchor(id) {
            // One that is there may be near its end by now.
            Some(there) if pem_of(&there.der) == pem => Ok(there.clone()),
            Some(_) => Err(ImportRefused::OldKey(id.to_string()).to_string()),
            None => read.map_err(|error| format!("it {error}")),
        }
    }

    /// Takes an issuer, or says what is in its way.
    fn issuer(&mut self, issuer: &ProposedIssuer, anchors: &[AnchorRecord]) -> Result<(), String> {
        if self.state.denies(issuer.id) {
            return Err("it was denied, since its key is in other hands: renew it with a new key \
                        (rotationPolicy: Always)"
                .to_owned());
        }
        let (anchor, record) = match self.state.issuer(issuer.id) {
            Some(known) if first_of(&issuer.pem).as_ref() != Some(&known.der) => {
                return Err("it has a new certificate for an old key: renew it with a new key \
                            (rotationPolicy: Always)"
                    .to_owned());
            }
            Some(known) => (self.known_anchor(known)?, None),
            None => {
                let (anchor, record) = self.chain(issuer, anchors)?;
                (anchor, Some(record))
            }
        };
        let id = anchor.id;
        let refused = |refused: ImportRefused| refused.to_string();
        self.wanted(id)?;
        if self.state.anchor(id).is_none() {
            self.state.import_anchor(anchor).map_err(refused)?;
        }
        if let Some(record) = record {
            let wish = self.state.request_issuer(id, self.revision).map_err(refused)?;
            self.state.import_issuer(wish, record).map_err(refused)?;
        }
        let is_listed = anchors.iter().any(|anchor| anchor.id == id);
        let state = self.state.anchor(id).map(|anchor| anchor.state);
        match state {
            Some(AnchorState::Active) => self.issuer_under_active(issuer.id),
            Some(AnchorState::Retiring) => self.back_to(id),
            Some(AnchorState::Generated | AnchorState::Standby) if is_listed => self.rotate_to(id),
            Some(AnchorState::Generated | AnchorState::Standby) => Err(format!(
                "it is under the anchor {}, which {} does not list: list it there",
                id.short(),
                self.proposed.bundle
            )),
            Some(AnchorState::Withdrawn) | None => {
                Err(ImportRefused::Tombstoned(id.to_string()).to_string())
            }
            Some(AnchorState::Staged) => Ok(()),
        }
    }

    /// Nobody has turned a rotation to this anchor back, or it has come to it all the same.
    fn wanted(&self, id: KeyId) -> Result<(), String> {
        let signs = |anchor: &AnchorRecord| {
            matches!(anchor.state, AnchorState::Active | AnchorState::Retiring)
        };
        let over = self.state.tombstones.contains(&id);
        if over || !self.state.unwanted.contains(&id) || self.state.anchor(id).is_some_and(signs) {
            return Ok(());
        }
        let short = id.short();
        Err(match self.state.anchor(id).map(|anchor| anchor.state) {
            Some(AnchorState::Standby) => format!(
                "a rotation to its anchor {short} was turned back by a person: begin it with \
                 `steadfast anchor rotate`, or keep an issuer under another anchor"
            ),
            _ => format!(
                "the anchor {short} was turned back by a person: begin the rotation with \
                 `steadfast anchor rotate --anchor FILE`, or take the anchor out of {}",
                self.proposed.bundle
            ),
        })
    }

    fn known_anchor(&self, known: &IssuerRecord) -> Result<AnchorRecord, String> {
        let anchor = self.state.anchor(known.anchor_id).cloned();
        anchor.ok_or_else(|| ImportRefused::Tombstoned(known.anchor_id.to_string()).to_string())
    }

    /// The anchor that it hangs from, and what the state is to know of it.
    fn chain(
        &self,
        issuer: &ProposedIssuer,
        anchors: &[AnchorRecord],
    ) -> Result<(AnchorRecord, IssuerRecord), String> {
        let known = self.state.anchors.iter().filter(|anchor| {
            anchor.is_external() && anchors.iter().all(|listed| listed.id != anchor.id)
        });
        let mut candidates: Vec<_> = known.chain(anchors).collect();
        // What the tool itself names comes first.
        candidates.sort_by_key(|anchor| !issuer.roots.contains(&anchor.id));
        let mut first = None;
        for anchor in candidates {
            let mut with = self.state.clone();
            if with.anchor(anchor.id).is_none()
                && let Err(refused) = with.import_anchor(anchor.clone())
            {
                first.get_or_insert_with(|| refused.to_string());
                continue;
            }
            let request = IssuerRequest {
                number: self.revision,
                anchor_id: anchor.id,
                key_id: issuer.id,
                csr: Vec::new(),
                key_ref: issuer.key_ref.clone(),
            };
            match import::issuer(&with, &[request], issuer.pem.as_bytes(), self.now) {
                Ok((_, record)) => {
                    let record = IssuerRecord { key_ref: issuer.key_ref.clone(), ..record };
                    return Ok((anchor.clone(), record));
                }
                Err(error) => {
                    first.get_or_insert_with(|| error.to_string());
                }
            }
        }
        let is_there = |id: &KeyId| {
            self.state.anchor(*id).is_some() || anchors.iter().any(|anchor| anchor.id == *id)
        };
        match issuer.roots.iter().find(|root| !is_there(root)) {
            Some(root) if !issuer.roots.iter().any(is_there) => Err(format!(
                "it is under the anchor {}, which {} does not list: list it there",
                root.short(),
                self.proposed.bundle
            )),
            _ => Err(first.unwrap_or_else(|| {
                format!("it is under no anchor that {} lists", self.proposed.bundle)
            })),
        }
    }

    /// The anchor stays; its newest issuer signs. A rotation that we had ordered away from it is
    /// undone; one that has come to it goes on.
    fn issuer_under_active(&mut self, issuer: KeyId) -> Result<(), String> {
        let leaves = self.state.rotation.as_ref().is_some_and(|rotation| {
            let came = [PhaseName::Activated, PhaseName::Draining, PhaseName::Withdrawn];
            self.is_ours(&rotation.by) && !came.contains(&rotation.phase.name())
        });
        if leaves || self.state.requested.as_ref().is_some_and(|request| self.is_ours(&request.by))
        {
            return self.back();
        }
        // The one that was made last, whatever its life; of two of one moment, the one that lives on.
        let age = |id| self.state.issuer(id).map(|issuer| (issuer.not_before, issuer.not_after));
        let active = self.state.active_issuer;
        if issuer == active || age(issuer) <= age(active) {
            return Ok(());
        }
        // One that would be replaced at once would change places with another for ever.
        let record = self.state.issuer(issuer).ok_or("it has expired: renew it")?;
        let third = record.not_after.since(record.not_before) / 3;
        let anchor = self.state.anchor(record.anchor_id);
        let svid_life = anchor.map(|anchor| anchor.svid_life_max).unwrap_or_default();
        let left_min = self.proposed.issuer_left_min.min(third.max(svid_life));
        if record.not_after <= self.now + left_min {
            return Err(format!("it ends at {}, too soon to sign now: renew it", record.not_after));
        }
        let by = self.proposed.bundle.clone();
        let ordered = self.state.rotate_issuer_to(issuer, by, self.now);
        ordered.map(drop).map_err(|error| error.to_string())
    }

    fn is_ours(&self, by: &str) -> bool {
        by == self.proposed.bundle
    }

    /// What we have ordered is undone; what others have is not.
    fn back_to(&mut self, id: KeyId) -> Result<(), String> {
        match &self.state.rotation {
            Some(rotation) if !self.is_ours(&rotation.by) => Err(format!(
                "rotation {}, ordered by {}, leaves its anchor {}: bring an issuer under another \
                 anchor, or turn the rotation back (`steadfast anchor abort`)",
                rotation.number,
                rotation.by,
                id.short()
            )),
            _ => self.back(),
        }
    }

    fn back(&mut self) -> Result<(), String> {
        match &self.state.rotation {
            Some(rotation) if rotation.abort || rotation.turned_back => Ok(()),
            _ => self.state.undo().map_err(|error| error.to_string()),
        }
    }

    /// Orders a rotation, unless that has been done.
    fn rotate_to(&mut self, id: KeyId) -> Result<(), String> {
        let standby =
            self.state.anchor(id).is_some_and(|anchor| anchor.state == AnchorState::Standby);
        let aims =
            self.state.rotation.as_ref().is_some_and(|rotation| {
                rotation.aims_at(id) || standby && self.is_ours(&rotation.by)
            });
        let anchor = (!standby).then_some(id);
        let requested = self.state.requested.as_ref().filter(|request| request.anchor == anchor);
        let ours = requested.is_some_and(|request| self.is_ours(&request.by));
        match self.proposed.waits_for {
            Some(hours) if !aims && (requested.is_none() || ours) => {
                if ours {
                    // It has not begun while the window was open.
                    self.state.undo().map_err(|error| error.to_string())?;
                }
                let which =
                    if standby { String::new() } else { format!(" --anchor {}", id.short()) };
                return Err(format!(
                    "rotations begin in the maintenance window, {hours}: it waits for that, or for \
                     `steadfast anchor rotate{which}`"
                ));
            }
            _ if aims || requested.is_some() => return Ok(()),
            _ => {}
        }
        let request = Request {
            by: self.proposed.bundle.clone(),
            at: self.now,
            anchor,
            canary: None,
            replaces: None,
        };
        self.state.request(request).map_err(|error| error.to_string())
    }

    /// Without a tool that makes issuers: the first anchor that is listed and was never active.
    fn next_anchor(&mut self, anchors: &[AnchorRecord]) {
        let fresh = anchors.iter().filter(|anchor| {
            let there = self.state.anchor(anchor.id).map(|anchor| anchor.state);
            matches!(there, None | Some(AnchorState::Generated))
        });
        for anchor in fresh.cloned().collect::<Vec<_>>() {
            let wanted = self.wanted(anchor.id);
            let is_wanted = wanted.is_ok();
            if let Err(why) = wanted.and_then(|()| self.join_and_rotate_to(&anchor)) {
                let (bundle, id) = (&self.proposed.bundle, anchor.id.short());
                self.held.push(format!("{bundle}: the anchor {id} is held: {why}"));
            }
            if is_wanted {
                break;
            }
        }
    }

    fn join_and_rotate_to(&mut self, anchor: &AnchorRecord) -> Result<(), String> {
        if self.state.anchor(anchor.id).is_none() {
            self.state.import_anchor(anchor.clone()).map_err(|error| error.to_string())?;
        }
        self.rotate_to(anchor.id)
    }
}

/// The anchors in the entry of such a ConfigMap, or what is wrong with it.
pub fn listed(
    texts: Option<&BTreeMap<String, String>>,
    entry: &str,
) -> Result<Vec<Listed>, String> {
    let texts = texts.ok_or("it is not there")?;
    let text = texts.get(entry).ok_or_else(|| {
        let there: Vec<_> = texts.keys().map(String::as_str).collect();
        format!("it has no entry {entry:?}, but {there:?}")
    })?;
    let blocks = pem::parse_many(text).map_err(|error| format!("{entry}: {error}"))?;
    let anchors = blocks.iter().enumerate().map(|(index, block)| {
        let (tag, number) = (block.tag(), index + 1);
        if tag != "CERTIFICATE" {
            return Err(format!("{entry}: block {number} is a {tag:?}, not a certificate"));
        }
        let anchor = TrustAnchor::parse(block.contents());
        let anchor = anchor.map_err(|why| format!("{entry}: certificate {number} {why}"))?;
        Ok(Listed { id: anchor.id(), pem: pem_of(block.contents()) })
    });
    let anchors: Vec<_> = anchors.collect::<Result<_, String>>()?;
    if anchors.is_empty() { Err(format!("{entry} lists no certificate")) } else { Ok(anchors) }
}

/// The first certificate of a chain; `None`: there is none.
fn first_of(chain: &str) -> Option<Vec<u8>> {
    pem::parse_many(chain).ok()?.into_iter().next().map(pem::Pem::into_contents)
}

/// A certificate as it is compared.
fn pem_of(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

/// Follows the sources and orders what may be taken, while we lead.
pub struct Proposals {
    /// Where the bundle is, for people.
    pub bundle: String,
    /// Its entry.
    pub entry: String,
    /// Whether a tool makes the issuers too.
    pub makes_issuers: bool,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The time by the store's clock.
    pub now: Box<dyn Fn() -> UnixTime + Send + Sync>,
    /// When rotations begin by themselves.
    pub timings: Timings,
    /// What is held.
    pub held: watch::Sender<Vec<String>>,
    /// What is listed; `None`: it is not known.
    pub listed: watch::Sender<Option<Vec<KeyId>>>,
}

impl Proposals {
    /// For ever.
    pub async fn run(
        self,
        mut changes: Changes<BTreeMap<String, String>>,
        standing: watch::Receiver<Standing>,
    ) -> Infallible {
        let mut found: Option<Result<Vec<Listed>, String>> = None;
        let mut told = None;
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(texts)) => {
                        let read = listed(texts.as_ref(), &self.entry);
                        if let Ok(anchors) = &read {
                            let ids = anchors.iter().map(|anchor| anchor.id).collect();
                            self.listed.send_replace(Some(ids));
                        }
                        found = Some(read);
                    }
                    // What was there stays.
                    Some(Err(error)) => {
                        tracing::debug!(error, bundle = self.bundle, "not read");
                        if !matches!(found, Some(Ok(_))) {
                            found = Some(Err(format!("it cannot be read: {error}")));
                        }
                    }
                    None => tokio::time::sleep(LOOK_EVERY).await,
                },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let Some(found) = found.as_ref().filter(|_| standing.borrow().leads) else { continue };
            let trouble = self.look(found).await.err().map(|error| ErrorChain(&error).to_string());
            if let Some(error) = trouble.as_ref().filter(|_| trouble != told) {
                tracing::warn!(error, "proposals cannot be looked at");
            }
            told = trouble;
        }
    }

    async fn look(&self, listed: &Result<Vec<Listed>, String>) -> Result<(), LookError> {
        let issuer = match self.store.get(ISSUER_PROPOSAL_KEY).await? {
            Some(entry) if self.makes_issuers => Some(serde_json::from_slice(&entry.value)?),
            _ => None,
        };
        let Some(entry) = self.store.get(TRUST_DOMAIN_KEY).await? else { return Ok(()) };
        let state: TrustDomainState = serde_json::from_slice(&entry.value)?;
        let now = (self.now)();
        let open = self.timings.schedule.is_open(&state, now, self.timings.slow_path(&state));
        let proposed = Proposed {
            bundle: self.bundle.clone(),
            listed: listed.clone(),
            makes_issuers: self.makes_issuers,
            issuer,
            waits_for: self.timings.schedule.window.filter(|_| !open),
            issuer_left_min: self.timings.issuer_left_min,
        };
        let Decision { ordered, held } = decide(&state, entry.revision.0, &proposed, now);
        self.held.send_if_modified(|known| {
            let new = held.iter().filter(|held| !known.contains(held));
            new.for_each(|held| tracing::warn!(event = "proposal_held", "{held}"));
            std::mem::replace(known, held.clone()) != held
        });
        let Some(ordered) = ordered else { return Ok(()) };
        let value = serde_json::to_vec(&ordered)?;
        let expected = Some(entry.revision);
        let written = self.store.compare_and_swap(TRUST_DOMAIN_KEY, expected, Some(value.into()));
        match written.await {
            Ok(_) => {
                tracing::info!(
                    event = "proposal_taken",
                    by = self.bundle,
                    "orders are in the state"
                );
                Ok(())
            }
            // Somebody else was faster: what he wrote is looked at next.
            Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("what is stored does not parse (written by a newer version?)")]
    Json(#[from] serde_json::Error),
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

/// Beside what changes, also what must wait for something else is looked at again.
const LOOK_EVERY: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use steadfast_identity::authority::{Authority, found, make_anchor, make_issuer};
    use steadfast_rotation_protocol::rotation::{Goal, Next, Rotation};

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_795_262_400);
    const SECOND: Duration = Duration::from_secs(1);
    const BUNDLE: &str = "the ConfigMap steadfast-anchors/roots";

    fn root() -> Authority {
        make_anchor(&"cluster.local".parse().unwrap(), NOW, Duration::from_secs(90 * 86_400))
            .unwrap()
    }

    fn one(root: &Authority) -> Listed {
        Listed { id: root.id, pem: pem_of(&root.der) }
    }

    fn under(root: &Authority) -> ProposedIssuer {
        let life = Duration::from_secs(30 * 86_400);
        let domain = "cluster.local".parse().unwrap();
        let issuer = make_issuer(&domain, &root.der, &root.pkcs8, NOW, life).unwrap();
        let (pem, roots) = (pem_of(&issuer.der), vec![root.id]);
        ProposedIssuer { id: issuer.id, key_ref: "a Secret".to_owned(), pem, roots }
    }

    fn proposed(listed: &[&Authority], issuer: Option<ProposedIssuer>) -> Proposed {
        let source = "the Secret steadfast/issuer".to_owned();
        Proposed {
            bundle: BUNDLE.to_owned(),
            listed: Ok(listed.iter().map(|root| one(root)).collect()),
            makes_issuers: true,
            issuer: issuer.map(|issuer| IssuerProposal { source, found: Ok(issuer) }),
            waits_for: None,
            issuer_left_min: Duration::from_secs(86_400),
        }
    }

    fn idle() -> TrustDomainState {
        found(&"cluster.local".parse().unwrap(), NOW).unwrap().state
    }

    /// As after a rotation to this root with this issuer.
    fn under_way_to(root: &Authority, issuer: &ProposedIssuer) -> TrustDomainState {
        let decision = decide(&idle(), 7, &proposed(&[root], Some(issuer.clone())), NOW);
        assert_eq!(decision.held, [""; 0]);
        decision.ordered.unwrap()
    }

    fn active_under(root: &Authority, issuer: &ProposedIssuer) -> TrustDomainState {
        let mut state = under_way_to(root, issuer);
        state.requested = None;
        for anchor in &mut state.anchors {
            match anchor.state {
                AnchorState::Active => anchor.state = AnchorState::Withdrawn,
                _ if anchor.id == root.id => anchor.state = AnchorState::Active,
                _ => {}
            }
        }
        state.anchors.retain(|anchor| anchor.state != AnchorState::Withdrawn);
        state.active_issuer = issuer.id;
        state
    }

    #[test]
    fn an_anchor_is_rotated_to_once_an_issuer_under_it_is_there_and_only_once() {
        let root = root();
        let early = decide(&idle(), 7, &proposed(&[&root], None), NOW);
        assert_eq!(early, Decision::default(), "it is listed in good time, and waits");
        let issuer = under(&root);
        let state = under_way_to(&root, &issuer);
        let request = state.requested.as_ref().unwrap();
        assert_eq!((request.anchor, &*request.by), (Some(root.id), BUNDLE));
        let known = state.issuer(issuer.id).unwrap();
        assert_eq!((known.anchor_id, &*known.key_ref), (root.id, "a Secret"));
        assert!(state.wanted_external.is_empty());
        let again = decide(&state, 8, &proposed(&[&root], Some(issuer)), NOW);
        assert_eq!(again, Decision::default());
    }

    #[test]
    fn without_a_tool_for_issuers_an_anchor_is_rotated_to_as_it_is_listed() {
        let root = root();
        let proposed = Proposed { makes_issuers: false, ..proposed(&[&root], None) };
        let state = decide(&idle(), 7, &proposed, NOW).ordered.unwrap();
        assert_eq!(state.requested.as_ref().unwrap().anchor, Some(root.id));
        assert_eq!(decide(&state, 8, &proposed, NOW), Decision::default());
    }

    #[test]
    fn an_issuer_under_an_anchor_that_is_not_listed_is_held_with_the_way_out() {
        let (root, other) = (root(), root());
        let decision = decide(&idle(), 7, &proposed(&[&other], Some(under(&root))), NOW);
        assert_eq!(decision.ordered, None);
        let [held] = &decision.held[..] else { panic!("{:?}", decision.held) };
        for word in [&*root.id.short().to_string(), "the Secret steadfast/issuer", "list it there"]
        {
            assert!(held.contains(word), "{word} is not in {held}");
        }
    }

    #[test]
    fn a_newer_issuer_of_the_active_anchor_signs_and_an_older_one_does_not() {
        let root = root();
        let first = under(&root);
        let state = active_under(&root, &first);
        assert_eq!(decide(&state, 9, &proposed(&[&root], Some(first.clone())), NOW).ordered, None);
        let life = Duration::from_secs(40 * 86_400);
        let domain = "cluster.local".parse().unwrap();
        let made = make_issuer(&domain, &root.der, &root.pkcs8, NOW, life).unwrap();
        let second = ProposedIssuer { id: made.id, pem: pem_of(&made.der), ..first.clone() };
        let state = decide(&state, 9, &proposed(&[&root], Some(second.clone())), NOW);
        let mut state = state.ordered.unwrap();
        assert_eq!(state.issuer_rotation.as_ref().unwrap().by, BUNDLE);
        assert!(state.rotation.is_none() && state.requested.is_none());
        (state.issuer_rotation, state.active_issuer) = (None, second.id);
        assert_eq!(decide(&state, 9, &proposed(&[&root], Some(first)), NOW).ordered, None);
    }

    #[test]
    fn an_anchor_that_is_listed_no_more_stays_and_is_told() {
        let root = root();
        let issuer = under(&root);
        let state = active_under(&root, &issuer);
        let decision = decide(&state, 9, &proposed(&[], Some(issuer)), NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("it stays until a rotation"), "{:?}", decision.held);
        let gone = Proposed { listed: Err("it is not there".to_owned()), ..proposed(&[], None) };
        let decision = decide(&state, 9, &gone, NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("what it listed before stays"), "{:?}", decision.held);
    }

    #[test]
    fn an_issuer_that_goes_back_takes_the_rotation_with_it() {
        let (old, new) = (root(), root());
        let (before, after) = (under(&old), under(&new));
        let state = active_under(&old, &before);
        let ordered = decide(&state, 9, &proposed(&[&old, &new], Some(after)), NOW).ordered;
        let ordered = ordered.unwrap();
        assert_eq!(ordered.requested.as_ref().unwrap().anchor, Some(new.id));
        let back = decide(&ordered, 10, &proposed(&[&old, &new], Some(before)), NOW).ordered;
        assert_eq!(back.unwrap().requested, None);
    }

    #[test]
    fn what_was_withdrawn_or_has_an_old_key_is_refused_by_name() {
        let root = root();
        let mut state = idle();
        state.tombstones.push(root.id);
        let decision = decide(&state, 7, &proposed(&[&root], Some(under(&root))), NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("was withdrawn"), "{:?}", decision.held);
        // The same key with another certificate.
        let state = active_under(&root, &under(&root));
        let key = steadfast_identity::key::AuthorityKey::from_pkcs8(&root.pkcs8).unwrap();
        let again = steadfast_identity::authority::make_anchor_of(
            &state.trust_domain,
            &key,
            String::new(),
            NOW,
            Duration::from_secs(99 * 86_400),
        );
        let listed = Listed { id: root.id, pem: pem_of(&again.unwrap().der) };
        let proposed = Proposed { listed: Ok(vec![listed]), ..proposed(&[], None) };
        let decision = decide(&state, 7, &proposed, NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("new certificate for an old key"), "{:?}", decision.held);
    }

    #[test]
    fn a_rotation_of_somebody_else_comes_first() {
        let root = root();
        let mut state = idle();
        let by = "a person".to_owned();
        let request = Request { by, at: NOW, anchor: None, canary: None, replaces: None };
        state.request(request).unwrap();
        let decision = decide(&state, 7, &proposed(&[&root], Some(under(&root))), NOW);
        assert!(decision.held[0].contains("is under way"), "{:?}", decision.held);
        let ordered = decision.ordered.unwrap();
        assert_eq!(ordered.requested.as_ref().unwrap().by, "a person");
        assert!(ordered.anchor(root.id).is_some(), "it waits, with its issuer");
    }

    #[test]
    fn a_rotation_that_somebody_else_has_ordered_away_from_the_anchor_goes_on() {
        let root = root();
        let issuer = under(&root);
        let mut state = active_under(&root, &issuer);
        for anchor in &mut state.anchors {
            match anchor.state {
                AnchorState::Active => anchor.state = AnchorState::Retiring,
                AnchorState::Standby => anchor.state = AnchorState::Active,
                _ => {}
            }
        }
        state.rotation = Some(Rotation {
            number: 3,
            attempt: 0,
            by: "ann".to_owned(),
            started: NOW,
            since: NOW,
            goal: Goal::Successor { next: Next::Added, canary: None },
            added: None,
            urgent: None,
            deadline: None,
            abort: false,
            rescue: false,
            turned_back: false,
            phase: serde_json::from_str(r#"{"generating":null}"#).unwrap(),
            steps: Vec::new(),
        });
        let decision = decide(&state, 9, &proposed(&[&root], Some(issuer.clone())), NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("rotation 3, ordered by ann"), "{:?}", decision.held);
        // One of ours goes back.
        state.rotation.as_mut().unwrap().by = BUNDLE.to_owned();
        let decision = decide(&state, 9, &proposed(&[&root], Some(issuer)), NOW);
        assert!(decision.ordered.unwrap().rotation.unwrap().abort);
    }

    #[test]
    fn what_a_person_has_turned_back_is_held_until_a_person_begins_it_or_it_is_listed_no_more() {
        let (old, new) = (root(), root());
        let after = under(&new);
        let listed = proposed(&[&old, &new], Some(after.clone()));
        let without = Proposed { makes_issuers: false, ..proposed(&[&old, &new], None) };
        for proposed in [&listed, &without] {
            let mut state = active_under(&old, &under(&old));
            state.anchors.retain(|anchor| anchor.id != new.id);
            let mut state = decide(&state, 9, proposed, NOW).ordered.unwrap();
            assert_eq!(state.requested.as_ref().unwrap().anchor, Some(new.id));
            state.abort().unwrap();
            let held = decide(&state, 10, proposed, NOW);
            assert_eq!(held.ordered, None);
            let [held] = &held.held[..] else { panic!("{:?}", held.held) };
            assert!(held.contains("was turned back by a person"), "{held}");

            let mut begun = state.clone();
            let by = "ann".to_owned();
            let anchor = Some(new.id);
            let request = Request { by, at: NOW, anchor, canary: None, replaces: None };
            begun.request(request).unwrap();
            assert_eq!(decide(&begun, 11, proposed, NOW), Decision::default());
            // Of a rotation that went wrong, not of a person's word: it is ordered again.
            begun.undo().unwrap();
            let again = decide(&begun, 12, proposed, NOW).ordered.unwrap();
            assert_eq!(again.requested.as_ref().unwrap().by, BUNDLE);

            let listed = vec![one(&old)];
            let fewer = Proposed { listed: Ok(listed), issuer: None, ..proposed.clone() };
            let forgiven = decide(&state, 11, &fewer, NOW).ordered.unwrap();
            let again = decide(&forgiven, 12, proposed, NOW).ordered.unwrap();
            assert_eq!(again.requested.as_ref().unwrap().anchor, Some(new.id));
        }
    }

    #[test]
    fn an_anchor_that_a_person_has_forgotten_is_not_brought_back_by_the_list() {
        let root = root();
        let waits = Some(Window { from: Duration::ZERO, length: Duration::ZERO });
        let proposed = proposed(&[&root], Some(under(&root)));
        let early = Proposed { waits_for: waits, ..proposed.clone() };
        let mut state = decide(&idle(), 7, &early, NOW).ordered.unwrap();
        state.forget_anchor(root.id).unwrap();
        let decision = decide(&state, 8, &proposed, NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("was turned back by a person"), "{:?}", decision.held);
    }

    #[test]
    fn a_rotation_waits_for_the_maintenance_window_and_an_issuer_does_not() {
        let root = root();
        let hours = Window { from: Duration::from_secs(79_200), length: Duration::from_secs(7200) };
        let issuer = under(&root);
        let open = proposed(&[&root], Some(issuer.clone()));
        let closed = Proposed { waits_for: Some(hours), ..open.clone() };
        let Decision { ordered, held } = decide(&idle(), 7, &closed, NOW);
        let state = ordered.unwrap();
        assert!(state.requested.is_none() && state.issuer(issuer.id).is_some());
        assert!(held[0].contains("22:00 to 00:00 UTC"), "{held:?}");
        let state = decide(&state, 8, &open, NOW).ordered.unwrap();
        assert_eq!(state.requested.unwrap().anchor, Some(root.id));
        // Another issuer of the anchor that is active already goes on at any hour.
        let state = active_under(&root, &under(&root));
        let closed = Proposed { issuer: open.issuer, ..closed };
        assert!(decide(&state, 9, &closed, NOW + SECOND).ordered.is_some());
    }

    #[test]
    fn an_issuer_that_was_made_later_signs_however_short_its_life_is() {
        let root = root();
        let first = under(&root);
        let state = active_under(&root, &first);
        let domain = "cluster.local".parse().unwrap();
        let life = Duration::from_secs(20 * 86_400);
        let made = make_issuer(&domain, &root.der, &root.pkcs8, NOW + SECOND, life).unwrap();
        let second = ProposedIssuer { id: made.id, pem: pem_of(&made.der), ..first };
        let decision = decide(&state, 9, &proposed(&[&root], Some(second)), NOW + SECOND);
        assert_eq!(decision.held, [""; 0]);
        assert_eq!(decision.ordered.unwrap().issuer_rotation.unwrap().by, BUNDLE);
    }

    #[test]
    fn of_three_issuers_the_one_that_is_proposed_signs_and_none_takes_its_place_again() {
        let root = root();
        let domain = "cluster.local".parse().unwrap();
        let made = |day: u32, days: u64| {
            let begins = NOW + Duration::from_secs(86_400) * day;
            let life = Duration::from_secs(86_400 * days);
            let made = make_issuer(&domain, &root.der, &root.pkcs8, begins, life).unwrap();
            ProposedIssuer { id: made.id, pem: pem_of(&made.der), ..under(&root) }
        };
        let issuers = [made(0, 80), made(1, 60), made(2, 30)];
        let now = NOW + Duration::from_secs(86_400 * 3);
        let mut state = active_under(&root, &issuers[0]);
        for issuer in &issuers[1..] {
            let decision = decide(&state, 9, &proposed(&[&root], Some(issuer.clone())), now);
            state = decision.ordered.unwrap();
            let rotation = state.issuer_rotation.take().unwrap();
            assert_eq!(rotation.to, Some(issuer.id));
            state.active_issuer = issuer.id;
        }
        let last = proposed(&[&root], Some(issuers[2].clone()));
        assert_eq!(decide(&state, 9, &last, now).ordered, None);
        // Near its end another may have taken its place: it is told, and does not come back.
        state.active_issuer = issuers[1].id;
        let late = NOW + Duration::from_secs(86_400 * 31);
        let decision = decide(&state, 9, &last, late);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("renew it"), "{:?}", decision.held);
    }

    #[test]
    fn an_issuer_with_a_new_certificate_for_its_old_key_is_held() {
        let root = root();
        let first = under(&root);
        let state = active_under(&root, &first);
        let renewed = ProposedIssuer { pem: under(&root).pem, ..first };
        let decision = decide(&state, 9, &proposed(&[&root], Some(renewed)), NOW);
        assert_eq!(decision.ordered, None);
        assert!(decision.held[0].contains("rotationPolicy: Always"), "{:?}", decision.held);
    }

    #[test]
    fn nothing_is_ordered_of_a_store_that_was_put_back() {
        let root = root();
        let mut state = idle();
        state.halted =
            Some(steadfast_rotation_protocol::trust_domain::Halt::Restored { seen_seq: 9 });
        let decision = decide(&state, 7, &proposed(&[&root], Some(under(&root))), NOW);
        assert_eq!(decision, Decision::default());
    }

    #[test]
    fn a_config_map_is_read_certificate_by_certificate() {
        let (a, b) = (root(), root());
        let text = pem_of(&a.der) + "# a comment\n" + &pem_of(&b.der);
        let texts = BTreeMap::from([("ca.crt".to_owned(), text)]);
        let found = listed(Some(&texts), "ca.crt").unwrap();
        assert_eq!(found, [one(&a), one(&b)]);
        assert!(listed(Some(&texts), "other").unwrap_err().contains("ca.crt"));
        assert_eq!(listed(None, "ca.crt").unwrap_err(), "it is not there");
        let wrong = BTreeMap::from([("ca.crt".to_owned(), "x".to_owned())]);
        assert!(listed(Some(&wrong), "ca.crt").unwrap_err().contains("no certificate"));
    }
}
