"""The class that no setting switches off: sexual content that involves minors.

A prompt belongs to it when its normalized variants name a minor and something sexual. It is a rule
over words, not over meaning: it knows English only, errs on the side of refusing where both
kinds of words meet, and does not honour a "no" before a word, because text encoders do not
either; what a picture should not show belongs in the negative prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
_NUMBER = rf"(?:0?[1-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|{_TEENS})"
_NOT_A_PERSON = (
    r"(?! (?:whisky|whiskey|scotch|rum|wine|port|bourbon|cheese|car|house|building|tree|oak|dog"
    r"|cat|horse|painting|tradition)\b)"
)
AGE = re.compile(
    rf" (?:{_NUMBER} ?(?:y|yrs?|years?) ?(?:olds?|o)|{_NUMBER} ?yo|\d\d? ?months? old"
    rf"|{_NUMBER} (?:yrs?|years?) of age|aged? (?:of )?{_NUMBER}"
    rf"|(?:under|below) (?:18|eighteen|age))(?= ){_NOT_A_PERSON}"
)

MINORS = _listed(
    "child childs children childlike kid kids kiddo kiddos toddler toddlers infant infants newborn"
    " newborns baby babies preteen preteens tween tweens underage underaged minors teen teens"
    " teenage teenaged teenager teenagers adolescent adolescents schoolgirl schoolgirls schoolboy"
    " schoolboys schoolchild schoolchildren schoolkid schoolkids preschooler preschoolers"
    " kindergartner kindergartners kindergartener prepubescent pubescent loli lolis lolita lolitas"
    " shota shotas"
)
MINOR_PHRASES = re.compile(
    r" (?:(?:little|young|small|tiny|school|underaged?) (?:girl|boy)s?|pre teens?|(?:first|second"
    r"|third|fourth|fifth|sixth|seventh|eighth) graders?|(?:elementary|primary|middle|junior high)"
    r" school(?:er|ers)?) "
)

SEXUAL = _listed(
    "nude nudes nudity nudist naked nsfw sex sexy sexual sexually sexualized sexualised erotic"
    " erotica erotically rape raped raping penis penises vagina vaginas vulva labia clitoris"
    " nipple nipples breasts topless undressed undressing unclothed disrobed disrobing striptease"
    " lingerie panties upskirt cameltoe seductive seductively seducing sensual sensually aroused"
    " arousal horny lewd lewdly slut slutty whore bdsm bondage fetish dildo vibrator blowjob"
    " handjob deepthroat creampie cum cumming cumshot gangbang threesome orgy coitus intercourse"
    " erection anal pussy boobs tits titties busty provocatively ahegao"
)
SEXUAL_STEMS = re.compile(
    r" (?:porn|hentai|masturbat|ejaculat|fellat|cunniling|orgasm|molest|incest|fuck|genital"
    r"|copulat|stripper)"
)
SEXUAL_PHRASES = re.compile(
    r" (?:(?:no|without|removing|took off|taking off) (?:any |her |his |their )?(?:clothes"
    r"|clothing)|wearing nothing|(?:spread|spreading) (?:her |his |their )?legs|legs spread"
    r"|provocative poses?|strip tease|bare breasted|in bed with a(?:n adult)? man) "
)

#: Both kinds in one word.
ALONE = re.compile(r" (?:lolicon|shotacon|toddlercon|jailbait|pa?edo(?:phil\w*|porn\w*)?) ")

#: Words of either kind in what is neither.
INNOCENT = re.compile(
    r" (?:(?:same|opposite|fair) sex|sex (?:education|ed|and the city)|cum laude"
    r"|naked (?:eye|mole|cake|tree|trees|branches|flame|neck)"
    r"|nude (?:lipstick|heels|pumps|nails|eyeshadow)|topless (?:car|jeep)|bottle nipples?"
    r"|(?:blue|great|coal|marsh|willow|crested|tailed) tits|pussy (?:willows?|cats?)"
    r"|rape (?:fields?|flowers?|blossoms?|seeds?|oil)|(?:chicken|turkey|duck) breasts"
    r"|child (?:bearing|s pose)|inner child|kid (?:gloves?|leather|skin)|billy the kid"
    r"|baby (?:blue|pink|dolls?|oil|face|faced|hair|bump|powder)"
    r"|(?:gothic|sweet|classic) lolita|lolita (?:fashion|dress|style|outfit))(?= )"
)

_ANY_MINOR = "|".join(sorted(MINORS, key=len, reverse=True))
GLUED = re.compile(rf" (?:(?:{_ANY_MINOR})(\w{{3,14}})|(\w{{3,14}}?)(?:{_ANY_MINOR}))(?= )")


def involves_minors_sexually(variants: Iterable[str]) -> bool:
    """Judge the result of `normalize.normalized_variants`; ages are looked for in the first
    only.
    """
    minor = sexual = False
    for n, variant in enumerate(variants):
        text = INNOCENT.sub("", variant)
        if ALONE.search(text):
            return True
        minor = minor or _minor(text) or (n == 0 and AGE.search(text) is not None)
        sexual = sexual or _sexual(text)
        if (minor and sexual) or _both_in_one(text):
            return True
    return False


def _minor(text: str) -> bool:
    return not MINORS.isdisjoint(text.split()) or MINOR_PHRASES.search(text) is not None


def _sexual(text: str) -> bool:
    return (
        not SEXUAL.isdisjoint(text.split())
        or SEXUAL_STEMS.search(text) is not None
        or SEXUAL_PHRASES.search(text) is not None
    )


def _both_in_one(text: str) -> bool:
    """Two words written as one."""
    return any(_sexual(f" {m[1] or m[2]} ") for m in GLUED.finditer(text))
