//! Readiness as a level: ready while no component says why not, and it can go back.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

/// Why the process is not ready, by component. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<watch::Sender<BTreeMap<&'static str, String>>>);

/// The say of one component. Dropping it withdraws its objection, since what is gone waits for
/// nothing.
#[derive(Debug)]
pub struct Component {
    name: &'static str,
    readiness: Readiness,
}

/// What `/ready` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether no component objects.
    pub ready: bool,
    /// Component and reason, for those that do.
    pub reasons: BTreeMap<&'static str, String>,
}

impl Readiness {
    /// Ready, until a component objects.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(BTreeMap::new())))
    }

    /// Adds a component that is not ready yet, for this reason.
    pub fn component(&self, name: &'static str, reason: &str) -> Component {
        let component = Component { name, readiness: self.clone() };
        component.not_ready(reason);
        component
    }

    /// The level now.
    pub fn report(&self) -> Report {
        let reasons = self.0.borrow().clone();
        Report { ready: reasons.is_empty(), reasons }
    }

    /// Waits until the process is ready.
    pub async fn ready(&self) {
        // The sender lives as long as `self`: waiting cannot fail.
        let _ = self.0.subscribe().wait_for(BTreeMap::is_empty).await;
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Component {
    /// The component has what it needs.
    pub fn ready(&self) {
        self.readiness.0.send_if_modified(|reasons| reasons.remove(self.name).is_some());
    }

    /// The component lacks something: the reason is shown in `/ready`.
    pub fn not_ready(&self, reason: &str) {
        self.readiness.0.send_if_modified(|reasons| {
            let changed = reasons.get(self.name).is_none_or(|old| old != reason);
            if changed {
                reasons.insert(self.name, reason.to_owned());
            }
            changed
        });
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        self.ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_goes_back_when_a_component_objects_again() {
        let readiness = Readiness::new();
        let svid = readiness.component("identity", "no SVID yet");
        assert_eq!(readiness.report().reasons["identity"], "no SVID yet");
        svid.ready();
        assert!(readiness.report().ready);
        svid.not_ready("the SVID has expired");
        assert!(!readiness.report().ready);
        drop(svid);
        assert!(readiness.report().ready);
    }
}
