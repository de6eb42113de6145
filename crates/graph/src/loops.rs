//! Chains of backing files that would lead back to where they begin.
//!
//! Every command that writes the name of a backing file into an image asks here first. The chain is followed by what
//! the images say, one at a time and only for reading, so that a chain that is not whole is followed as far as it
//! goes. Files are compared by device and inode ([`Place`]), whatever their names look like.

use std::sync::Arc;

use dolmen_types::{ChildRole, Options, Result, Value};

use crate::place::{Place, place_in};
use crate::{
    BackingName, Class, GraphOwner, Implicit, ImplicitChild, MAX_CHAIN, Node, NodeOpener, OpenPolicy,
    content, own_file,
};

/// The children of a filter that show its data.
pub(crate) const SHOWN: [&str; 2] = ["file", "image"];

impl NodeOpener<'_> {
    /// Makes sure that an image does not become its own backing file, directly or by way of others.
    ///
    /// # Errors
    /// `InvalidInput` when it would.
    pub async fn check_backing(&self, image: &Arc<Node>, to: BackingName<'_>) -> Result<()> {
        let name = own_file(image);
        let mut leaf = image;
        while let Some(c) = leaf.child("file").or_else(|| leaf.children.first()) {
            leaf = &c.node;
        }
        let Some(own) = leaf.driver.describe(leaf).file.map(Place::Present) else { return Ok(()) };
        match self.chain_has(&crate::join(&name, to.name), to.format, &own).await {
            true => Err(crate::create::loops(&name, to.name)),
            false => Ok(()),
        }
    }

    /// Whether an image, or one that it lies over, is in the file `own`. What can't be opened, and what a server
    /// holds, is not followed any further.
    pub(crate) async fn chain_has(&self, name: &str, format: Option<&str>, own: &Place) -> bool {
        let child = ImplicitChild {
            child: "backing",
            role: ChildRole::Backing,
            filename: name.to_owned(),
            format: format.map(str::to_owned),
        };
        // The first name is the user's own word.
        let mut next = self.named_by("", &child).await;
        for _ in 0..MAX_CHAIN {
            let Ok(options) = next else { return false };
            if self.names_place(&options, own).await {
                return true;
            }
            let mut image = self.image_in(options);
            match image.take("backing") {
                Some(Value::Map(m)) => next = Options::from_value(Value::Map(m)),
                Some(_) => return false,
                None => match self.backing_of(image).await {
                    Some((image, child)) => next = self.permit(&image, &child).await,
                    None => return false,
                },
            }
        }
        false
    }

    /// The same for a chain that is open, as far as its images name what they are linked to.
    pub(crate) async fn open_chain_has(&self, node: &Arc<Node>, own: &Place) -> bool {
        let mut at = Some(node);
        while let Some(image) = at.map(content) {
            let mut leaf = image;
            while let Some(c) = leaf.child("file").or_else(|| leaf.children.first()) {
                leaf = &c.node;
            }
            if leaf.driver.describe(leaf).file.map(Place::Present).as_ref() == Some(own) {
                return true;
            }
            let Some((named, format)) = image.driver.describe(image).backing else { return false };
            let named = crate::join(&own_file(image), &named);
            at = image.backing();
            if at.is_none_or(|below| own_file(content(below)) != named) {
                return self.chain_has(&named, format.as_deref(), own).await;
            }
        }
        false
    }

    /// Whether options, or those of a child in them, name the file.
    async fn names_place(&self, options: &Options, own: &Place) -> bool {
        let mut names = Vec::new();
        collect(&options.clone().into_value(), &mut names);
        for name in names {
            let name = name.strip_prefix("file:").unwrap_or(&name);
            if place_in(self.rt, name).await.is_ok_and(|p| p.as_ref() == Some(own)) {
                return true;
            }
        }
        false
    }

    /// The image that filters show.
    fn image_in(&self, mut options: Options) -> Options {
        loop {
            let filter = matches!(options.get("driver"), Some(Value::Str(d))
                if self.registry.find(d).is_ok_and(|k| !k.options.iter().any(|o| o.name == "backing")));
            let below = SHOWN.iter().find_map(|name| match options.get(name) {
                Some(Value::Map(m)) if filter => Options::from_value(Value::Map(m.clone())).ok(),
                _ => None,
            });
            match below {
                // A raw image is a filter, too: what it stands on is no image.
                Some(below) if self.is_image(&below) => options = below,
                _ => return options,
            }
        }
    }

    fn is_image(&self, options: &Options) -> bool {
        match options.get("driver") {
            Some(Value::Str(d)) => self.registry.find(d).is_ok_and(|k| k.class != Class::Protocol),
            _ => options.has("file"),
        }
    }

    /// What an image says about its backing file, and the name of its own.
    async fn backing_of(&self, mut options: Options) -> Option<(String, ImplicitChild)> {
        if !self.is_image(&options) || remote(&options.clone().into_value()) {
            return None;
        }
        let policy = OpenPolicy { implicit: Implicit::Deny, probe: true, ..self.policy };
        let opener = NodeOpener { policy, ..*self };
        options.set("read-only", true);
        options.set("force-share", true);
        let owner = GraphOwner::new(self.rt.clone());
        let mut draft = owner.draft();
        let driver = match options.take_str("driver").ok()? {
            Some(d) => d,
            None => opener.probe(&mut draft, &mut options, Default::default()).await.ok()?,
        };
        let kind = self.registry.find(&driver).ok()?;
        if !kind.options.iter().any(|o| o.name == "backing") {
            return None;
        }
        options.set("driver", driver);
        options.set("backing", Value::Null);
        let node = opener.open(&mut draft, options, false).await.ok()?;
        let node = draft.built_node(&node).ok()?;
        let (filename, format) = node.driver.describe(&node).backing?;
        let child = ImplicitChild { child: "backing", role: ChildRole::Backing, filename, format };
        Some((own_file(&node), child))
    }
}

/// The file names in options and in the children that they define.
fn collect(value: &Value, out: &mut Vec<String>) {
    let Value::Map(m) = value else { return };
    for (k, v) in m {
        match v {
            Value::Str(name) if k == "filename" || k.ends_with(".filename") => out.push(name.clone()),
            v => collect(v, out),
        }
    }
}

/// Whether a server is asked, which may never answer.
fn remote(value: &Value) -> bool {
    let Value::Map(m) = value else { return false };
    m.iter().any(|(k, v)| k == "server" || remote(v))
}
