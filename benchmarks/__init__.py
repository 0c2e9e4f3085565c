"""Speed beside other libraries, each file a command. (A package, since Opacus installs one of this name.)"""
